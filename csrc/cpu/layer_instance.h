// The layer's kernels of one instruction set: included once by each of layer_generic.cpp, layer_avx2.cpp and
// layer_avx512.cpp, after the target pragma, with RWKV_ISA and RWKV_LANE_BYTES defined.

namespace rwkv::RWKV_ISA {
namespace {

#include "cpu/lanes.h"
#include "cpu/elements.h"
#include "cpu/cross_entropy.h"
#include "cpu/head_norm.h"
#include "cpu/layer_norm.h"
#include "cpu/mix.h"
#include "cpu/pointwise.h"

constexpr LayerKernels layer_kernels() {
  return {cross_entropy,  mix,
          mix_backward,   head_norm_gate,
          head_norm_gate_backward, add_layer_norm,
          add_layer_norm_backward, squared_relu,
          squared_relu_backward,   sigmoid_gate,
          sigmoid_gate_backward,   accumulate};
}

}  // namespace
}  // namespace rwkv::RWKV_ISA
