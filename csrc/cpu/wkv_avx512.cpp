// The CPU kernels for processors with AVX512.
#if defined(__x86_64__)
#include "cpu/kernel_includes.h"
// GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define RWKV_ISA avx512
#define RWKV_LANE_BYTES 64
#include "cpu/wkv_instance.h"

namespace rwkv {
constexpr WkvKernels kKernels = avx512::kernels("avx512");
const WkvKernels kWkvAvx512 = kKernels;
}  // namespace rwkv
#endif
