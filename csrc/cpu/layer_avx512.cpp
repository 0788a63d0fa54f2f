// The layer's kernels for processors with AVX512.
#if defined(__x86_64__)
#include "cpu/layer_includes.h"
// GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define RWKV_ISA avx512
#define RWKV_LANE_BYTES 64
#include "cpu/layer_instance.h"

namespace rwkv {
const LayerKernels kLayerAvx512 = avx512::layer_kernels();
}  // namespace rwkv
#endif
