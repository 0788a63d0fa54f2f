// The decode kernels for processors with AVX512.
#if defined(__x86_64__)
#include "cpu/decode_includes.h"
#include "cpu/target_avx512.h"
#include "cpu/decode_instance.h"

namespace rwkv {
constexpr DecodeKernels kKernels = avx512::decode_kernels();
const DecodeKernels kDecodeAvx512 = kKernels;
}  // namespace rwkv
#endif
