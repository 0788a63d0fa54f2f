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

// out_c = base + (other - base) (weights_c + low_c): base is a token's own h and other its predecessor's, or the other
// way round.
// Rows are the B * T tokens. Forward leaves the pointers that begin with d alone.
struct MixParams {
  Dtype dtype = Dtype::kFloat32;  // of all but weights and their sums, which are fp32 (fp64)
  int64_t tokens = 0;             // of all batch rows together
  int64_t tokens_per_row = 0;
  int64_t width = 0;
  int64_t count = 0;            // C, the vectors that are mixed
  bool weighs_current = false;  // base is the predecessor
  const void* h = nullptr;
  int64_t h_row_stride = 0, h_token_stride = 0;
  const void* last = nullptr;             // [sequences, D], nullptr: zeros
  const int64_t* starts_of = nullptr;     // [tokens]: the sequence that starts there, or -1
  const void* weights = nullptr;          // [C, D]
  const void* const* low = nullptr;       // C times [tokens, D]; nullptr: none
  void* const* out = nullptr;             // C times [tokens, D]
  const void* const* dout = nullptr;      // C times [tokens, D]
  void* const* dlow = nullptr;            // C times [tokens, D]; nullptr: none
  void* dh = nullptr;                     // [tokens, D]
  void* dlast = nullptr;                  // [sequences, D], zeroed; nullptr: none
  void* partial = nullptr;                // [blocks of tokens, C, D]: their shares of the weights' gradient
};

inline constexpr int64_t kPartialRows = 64;  // rows that add up to one partial sum
inline constexpr int64_t kMixGroup = 4;      // tokens whose gradients a mix takes together

// out = (weight (y - mean) / sqrt(var + eps) + bias) silu(gate), mean and var over each head of a row.
struct HeadNormParams {
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0, heads = 0, head_size = 0;
  double eps = 0;
  const void *y = nullptr, *gate = nullptr;       // [rows, H * N]
  const void *weight = nullptr, *bias = nullptr;  // [H * N], fp32 (fp64)
  void* out = nullptr;                            // [rows, H * N]
  const void* dout = nullptr;
  void *dy = nullptr, *dgate = nullptr;
  void* partial = nullptr;  // [blocks of rows, 2, H * N]: shares of the gradients of weight and bias
};

// s = x + delta, out = weight (s - mean) / sqrt(var + eps) + bias, mean and var over a row's D elements. Without delta
// s is x and is not written; backward takes s as x.
struct LayerNormParams {
  Dtype stream_dtype = Dtype::kFloat32;  // of x, the sum and their gradients: dtype, or fp32 beside 16 bits
  Dtype dtype = Dtype::kFloat32;         // of delta, out and their gradients
  int64_t rows = 0, width = 0;
  double eps = 0;
  const void *x = nullptr, *delta = nullptr;      // [rows, D]
  const void *weight = nullptr, *bias = nullptr;  // [D], fp32 (fp64)
  void *sum = nullptr, *out = nullptr;            // [rows, D]
  const void *dout = nullptr, *dsum = nullptr;    // [rows, D]; dsum may be nullptr: zeros
  void *dx = nullptr, *ddelta = nullptr;          // [rows, D]; ddelta may be nullptr: not wanted
  void* partial = nullptr;                        // [blocks of rows, 2, D]: shares of the weight's and bias's gradients
};

// Element by element over `count` of them: a squared ReLU of a, or sigmoid(a) b; with dout, their gradients.
struct PointwiseParams {
  Dtype dtype = Dtype::kFloat32;
  int64_t count = 0;
  const void *a = nullptr, *b = nullptr, *dout = nullptr;
  void *out = nullptr, *da = nullptr, *db = nullptr;
};

}  // namespace rwkv
