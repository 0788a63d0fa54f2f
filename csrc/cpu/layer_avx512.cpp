// The layer's kernels for processors with AVX512.
#if defined(__x86_64__)
#include "cpu/layer_includes.h"
#include "cpu/target_avx512.h"
#include "cpu/layer_instance.h"

namespace rwkv {
const LayerKernels kLayerAvx512 = avx512::layer_kernels();
}  // namespace rwkv
#endif
