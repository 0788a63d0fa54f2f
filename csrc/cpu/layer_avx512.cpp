// The layer's kernels for processors with AVX512.
#if defined(__x86_64__)
#include "cpu/layer_includes.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define RWKV_ISA avx512
#define RWKV_LANE_BYTES 64
#include "cpu/layer_instance.h"

namespace rwkv {
const LayerKernels kLayerAvx512 = avx512::layer_kernels();
}  // namespace rwkv
#endif
