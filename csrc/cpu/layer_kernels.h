// What one instruction set's translation unit offers to layer_cpu.cpp. A call handles rows (tokens, elements)
// begin to end - 1.
#pragma once

#include "layer_params.h"

namespace rwkv {

struct LayerKernels {
  // scratch has room for a row in arithmetic precision.
  void (*cross_entropy)(const CrossEntropyParams&, int64_t begin, int64_t end, void* scratch);
  void (*mix)(const MixParams&, int64_t begin, int64_t end);
  // Of one block of kPartialRows tokens; scratch has room for 2 kMixGroup + 1 rows.
  void (*mix_backward)(const MixParams&, int64_t block, void* scratch);
  void (*head_norm_gate)(const HeadNormParams&, int64_t begin, int64_t end, void* scratch);
  // Of one block of kPartialRows rows; scratch has room for two.
  void (*head_norm_gate_backward)(const HeadNormParams&, int64_t block, void* scratch);
  // scratch has room for a row.
  void (*add_layer_norm)(const LayerNormParams&, int64_t begin, int64_t end, void* scratch);
  // Of one block of kPartialRows rows; scratch has room for two.
  void (*add_layer_norm_backward)(const LayerNormParams&, int64_t block, void* scratch);
  void (*squared_relu)(const PointwiseParams&, int64_t begin, int64_t end);
  void (*squared_relu_backward)(const PointwiseParams&, int64_t begin, int64_t end);
  void (*sigmoid_gate)(const PointwiseParams&, int64_t begin, int64_t end);
  void (*sigmoid_gate_backward)(const PointwiseParams&, int64_t begin, int64_t end);
  void (*accumulate)(const PointwiseParams&, int64_t begin, int64_t end);
};

extern const LayerKernels kLayerGeneric;
#if defined(__x86_64__)
extern const LayerKernels kLayerAvx2;
extern const LayerKernels kLayerAvx512;
#endif

}  // namespace rwkv
