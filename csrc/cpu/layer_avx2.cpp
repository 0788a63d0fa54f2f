// The layer's kernels for processors with AVX2.
#if defined(__x86_64__)
#include "cpu/layer_includes.h"
#pragma GCC target("avx2,fma,f16c")
#define RWKV_ISA avx2
#define RWKV_LANE_BYTES 32
#include "cpu/layer_instance.h"

namespace rwkv {
const LayerKernels kLayerAvx2 = avx2::layer_kernels();
}  // namespace rwkv
#endif
