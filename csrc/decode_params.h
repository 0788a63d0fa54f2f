// Plain structs for one token of a whole model on the CPU, filled by decode_prepare.h. No torch, no ownership.
// Axes: B rows (sequences), D width, A = H * N attention width, F channel-mix width, R rank, V vocabulary.
#pragma once

#include <cstdint>

#include "wkv_params.h"

namespace rwkv {

inline constexpr int64_t kMaxDecodeBatch = 8;  // rows of one step; MAX_BATCH of rwkv_ext/models/fused_step.py

enum class Storage : int32_t { kFloat32, kBFloat16, kFloat16, kInt8 };

struct Vector {
  const void* data = nullptr;
  Storage storage = Storage::kFloat32;
};

// [rows, columns] contiguous. scale [rows] for kInt8: a row's value is its integers times its scale.
struct Matrix {
  const void* data = nullptr;
  Storage storage = Storage::kFloat32;
  const float* scale = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
};

// The five mixes of Finch in the order of its low-rank factors; Eagle has all but kMixW.
enum Mix { kMixW, kMixK, kMixV, kMixR, kMixG, kMixes };

// One block's weights. Projections are [out, in]; low-rank factors are [in, out], as the files have them.
struct DecodeLayer {
  Vector ln1_weight, ln1_bias, ln2_weight, ln2_bias;  // [D]
  Vector mix_x, mix[kMixes];                          // [D]
  Matrix mix_down, mix_up;                            // Finch: [D, 5 R], [5 R, D] (the five [R, D] below each other)
  Vector decay, bonus;                                // [A]
  Matrix decay_down, decay_up;                        // Finch: [D, Rd], [Rd, A]
  Matrix receptance, key, value, output, gate;        // [A, D], output [D, A]
  Vector head_norm_weight, head_norm_bias;            // [A]
  Vector ffn_mix_k, ffn_mix_r;                        // [D]
  Matrix ffn_key, ffn_receptance, ffn_value;          // [F, D], [D, D], [D, F]
};

// One part of the state: [L, S, ...] with the last axes contiguous; strides in elements.
struct StatePart {
  void* data = nullptr;
  Storage storage = Storage::kFloat32;
  int64_t layer_stride = 0;
  int64_t row_stride = 0;
};

struct DecodeParams {
  int64_t batch = 0, layers = 0, width = 0, heads = 0, head_size = 0, ffn_width = 0, vocabulary = 0;
  bool finch = false;
  const void* x = nullptr;  // [B, D] contiguous: rows of the embedding
  void* logits = nullptr;   // [B, V] contiguous
  Storage storage = Storage::kFloat32;  // of x and logits
  Vector ln0_weight, ln0_bias, ln_out_weight, ln_out_bias;
  Matrix head;
  const DecodeLayer* layer = nullptr;  // [L]
  StatePart att_shift, wkv, ffn_shift;
  const int64_t* slots = nullptr;  // [B]: the state's row of each row of x, -1 for none; nullptr: its own number
};

}  // namespace rwkv
