// The CPU kernels for processors with AVX2.
#if defined(__x86_64__)
#include "cpu/kernel_includes.h"
#include "cpu/target_avx2.h"
#include "cpu/wkv_instance.h"

namespace rwkv {
constexpr WkvKernels kKernels = avx2::kernels("avx2");
const WkvKernels kWkvAvx2 = kKernels;
}  // namespace rwkv
#endif
