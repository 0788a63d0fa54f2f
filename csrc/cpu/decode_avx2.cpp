// The decode kernels for processors with AVX2.
#if defined(__x86_64__)
#include "cpu/decode_includes.h"
#include "cpu/target_avx2.h"
#include "cpu/decode_instance.h"

namespace rwkv {
constexpr DecodeKernels kKernels = avx2::decode_kernels();
const DecodeKernels kDecodeAvx2 = kKernels;
}  // namespace rwkv
#endif
