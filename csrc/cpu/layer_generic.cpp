// The layer's kernels for every processor (x86-64 baseline, or NEON).
#include "cpu/layer_includes.h"
#define RWKV_ISA generic
#define RWKV_LANE_BYTES 16
#include "cpu/layer_instance.h"

namespace rwkv {
const LayerKernels kLayerGeneric = generic::layer_kernels();
}  // namespace rwkv
