// What one instruction set's translation unit offers to layer_cpu.cpp. A call handles the rows begin to end - 1.
#pragma once

#include "layer_params.h"

namespace rwkv {

struct LayerKernels {
  // scratch has room for a row in arithmetic precision.
  void (*cross_entropy)(const CrossEntropyParams&, int64_t begin, int64_t end, void* scratch);
};

extern const LayerKernels kLayerGeneric;
#if defined(__x86_64__)
extern const LayerKernels kLayerAvx2;
extern const LayerKernels kLayerAvx512;
#endif

}  // namespace rwkv
