// The CPU kernels for every processor (x86-64 baseline, or NEON).
#include "cpu/kernel_includes.h"
#define RWKV_ISA generic
#define RWKV_LANE_BYTES 16
#include "cpu/wkv_instance.h"

namespace rwkv {
constexpr WkvKernels kKernels = generic::kernels("generic");
const WkvKernels kWkvGeneric = kKernels;
}  // namespace rwkv
