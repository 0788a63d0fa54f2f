// The layer's kernels for processors with AVX2.
#if defined(__x86_64__)
#include "cpu/layer_includes.h"
#include "cpu/target_avx2.h"
#include "cpu/layer_instance.h"

namespace rwkv {
const LayerKernels kLayerAvx2 = avx2::layer_kernels();
}  // namespace rwkv
#endif
