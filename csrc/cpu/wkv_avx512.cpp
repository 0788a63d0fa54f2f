// The CPU kernels for processors with AVX512.
#if defined(__x86_64__)
#include "cpu/kernel_includes.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define RWKV_ISA avx512
#define RWKV_LANE_BYTES 64
#include "cpu/wkv_instance.h"

namespace rwkv {
constexpr WkvKernels kKernels = avx512::kernels("avx512");
const WkvKernels kWkvAvx512 = kKernels;
}  // namespace rwkv
#endif
