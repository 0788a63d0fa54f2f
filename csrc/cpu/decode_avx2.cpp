// The decode kernels for processors with AVX2.
#if defined(__x86_64__)
#include "cpu/decode_includes.h"
#pragma GCC target("avx2,fma,f16c")
#define RWKV_ISA avx2
#define RWKV_LANE_BYTES 32
#include "cpu/decode_instance.h"

namespace rwkv {
constexpr DecodeKernels kKernels = avx2::decode_kernels();
const DecodeKernels kDecodeAvx2 = kKernels;
}  // namespace rwkv
#endif
