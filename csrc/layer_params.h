// Plain structs for the ops of a layer that are neither a matrix product nor WKV: host code fills them, kernels read
// them. No torch, no ownership. Strides in elements; the last one is 1.
#pragma once

#include <cstdint>

#include "wkv_params.h"

namespace rwkv {

struct CrossEntropyParams {
  Dtype dtype = Dtype::kFloat32;  // of the logits; fp64 is summed in fp64, all else in fp32
  int64_t vocab = 0;
  int64_t row_stride = 0;
  void* logits = nullptr;            // [rows, V]
  const int64_t* targets = nullptr;  // [rows], each from 0 to V - 1
  void* loss = nullptr;              // [rows], fp32 or fp64
  double l2wrap = 0;
  bool overwrite = false;  // logits become their gradient
};

}  // namespace rwkv
