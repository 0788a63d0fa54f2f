// The decode kernels for every processor (x86-64 baseline, or NEON).
#include "cpu/decode_includes.h"
#define RWKV_ISA generic
#define RWKV_LANE_BYTES 16
#include "cpu/decode_instance.h"

namespace rwkv {
constexpr DecodeKernels kKernels = generic::decode_kernels();
const DecodeKernels kDecodeGeneric = kKernels;
}  // namespace rwkv
