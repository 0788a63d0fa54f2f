// The CPU kernels for processors with AVX512.
#if defined(__x86_64__)
#include "cpu/kernel_includes.h"
#include "cpu/target_avx512.h"
#include "cpu/wkv_instance.h"

namespace rwkv {
constexpr WkvKernels kKernels = avx512::kernels("avx512");
const WkvKernels kWkvAvx512 = kKernels;
}  // namespace rwkv
#endif
