// The CPU kernels for processors with AVX2.
#if defined(__x86_64__)
#include "cpu/kernel_includes.h"
#pragma GCC target("avx2,fma,f16c")
#define RWKV_ISA avx2
#define RWKV_LANE_BYTES 32
#include "cpu/wkv_instance.h"

namespace rwkv {
constexpr WkvKernels kKernels = avx2::kernels("avx2");
const WkvKernels kWkvAvx2 = kKernels;
}  // namespace rwkv
#endif
