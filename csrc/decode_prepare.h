// Validates what a whole model's step is given and fills its params. The weights come as one list, in the order in
// which weights_of and layer_of below read them; rwkv_ext/models/fused_step.py lists the same names.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "checks.h"
#include "decode_params.h"
#include "torch_api.h"

namespace rwkv {

using TensorList = std::vector<Tensor>;

struct DecodeCall {
  DecodeParams params;
  std::vector<DecodeLayer> layers;
  Tensor x, logits;
  OptionalTensor slots;
};

inline Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Storage::kBFloat16;
    case ScalarType::Half: return Storage::kFloat16;
    case ScalarType::Char: return Storage::kInt8;
    default: return Storage::kFloat32;  // the checks have refused everything else
  }
}

inline bool is_activation(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Hands out the tensors of a model's two lists one after the other, checked.
class WeightReader {
 public:
  WeightReader(const char* op, const Tensor& x, const TensorList& weights, const TensorList& scales)
      : op_(op), check_(op, x, "x"), weights_(weights), scales_(scales) {}

  void block(int64_t index) { prefix_ = "blocks." + std::to_string(index) + "."; }

  Vector vector(const char* name, int64_t size) {
    const Tensor& x = take(name);
    if (x.numel() != size) fail_shape(name, x, {size});
    if (!is_activation(x)) fail_dtype(name, x, "float32, bfloat16 or float16");
    return {x.data_ptr(), storage_of(x)};
  }

  // rows or columns -1: whatever the tensor has.
  Matrix factor(const char* name, int64_t rows, int64_t columns) {
    const Tensor& x = take(name);
    if (!is_activation(x)) fail_dtype(name, x, "float32, bfloat16 or float16");
    return matrix_of(name, x, rows, columns);
  }

  Matrix projection(const char* name, int64_t rows, int64_t columns) {
    const Tensor& x = take(name);
    const bool quantized = x.scalar_type() == ScalarType::Char;
    if (!is_activation(x) && !quantized) fail_dtype(name, x, "float32, bfloat16, float16 or int8");
    Matrix matrix = matrix_of(name, x, rows, columns);
    if (quantized) matrix.scale = scale(name, matrix.rows);
    return matrix;
  }

  void finish() const {
    if (next_ != weights_.size()) fail(op_, ": weights must have ", next_, " tensors, got ", weights_.size());
    if (next_scale_ != scales_.size())
      fail(op_, ": scales must have one tensor for each int8 matrix, ", next_scale_, " in all, got ", scales_.size());
  }

 private:
  const Tensor& take(const char* name) {
    if (next_ == weights_.size())
      fail(op_, ": weights must go on with ", prefix_, name, ", got ", weights_.size(), " tensors");
    const Tensor& x = weights_[next_++];
    if (!x.is_cpu()) check_.device((prefix_ + name).c_str(), x);
    if (!x.is_contiguous())
      fail(op_, ": ", prefix_, name, " must be contiguous, got strides ", sizes_text(x.strides().data(), x.dim()));
    return x;
  }

  const float* scale(const char* name, int64_t rows) {
    if (next_scale_ == scales_.size())
      fail(op_, ": scales must go on with that of ", prefix_, name, ", got ", scales_.size(), " tensors");
    const Tensor& x = scales_[next_scale_++];
    check_.device("scales", x);
    if (x.scalar_type() != ScalarType::Float || x.dim() != 1 || x.size(0) != rows || !x.is_contiguous())
      fail(op_, ": the scale of ", prefix_, name, " must be contiguous float32 [", rows, "], got ",
           dtype_text(x.scalar_type()), " ", shape_text(x));
    return static_cast<const float*>(x.data_ptr());
  }

  // More than two axes are rows: Finch's five second factors [5, R, D].
  Matrix matrix_of(const char* name, const Tensor& x, int64_t rows, int64_t columns) const {
    const int64_t last = x.dim() < 2 ? 0 : x.size(x.dim() - 1), all = last ? x.numel() / last : 0;
    if (!last || (rows >= 0 && all != rows) || (columns >= 0 && last != columns)) fail_shape(name, x, {rows, columns});
    return {x.data_ptr(), storage_of(x), nullptr, all, last};
  }

  [[noreturn]] void fail_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> wanted) const {
    fail(op_, ": ", prefix_, name, " must have shape ", sizes_text(wanted.begin(), int64_t(wanted.size())),
         " (-1: any), got ", shape_text(x));
  }

  [[noreturn]] void fail_dtype(const char* name, const Tensor& x, const char* wanted) const {
    fail(op_, ": ", prefix_, name, " must be ", wanted, ", got ", dtype_text(x.scalar_type()));
  }

  const char* op_;
  const Checks check_;
  const TensorList &weights_, &scales_;
  size_t next_ = 0, next_scale_ = 0;
  std::string prefix_;
};

inline DecodeLayer layer_of(WeightReader& read, const DecodeParams& p) {
  const int64_t width = p.width, attention = p.heads * p.head_size;
  DecodeLayer layer;
  layer.ln1_weight = read.vector("ln1.weight", width), layer.ln1_bias = read.vector("ln1.bias", width);
  layer.ln2_weight = read.vector("ln2.weight", width), layer.ln2_bias = read.vector("ln2.bias", width);
  if (p.finch) {
    layer.mix_x = read.vector("att.time_maa_x", width);
    const std::array names = {"att.time_maa_w", "att.time_maa_k", "att.time_maa_v", "att.time_maa_r", "att.time_maa_g"};
    for (int mix = kMixW; mix < kMixes; ++mix) layer.mix[mix] = read.vector(names[mix], width);
    layer.mix_down = read.factor("att.time_maa_w1", width, -1);
    layer.mix_up = read.factor("att.time_maa_w2", layer.mix_down.columns, width);
    layer.decay = read.vector("att.time_decay", attention);
    layer.decay_down = read.factor("att.time_decay_w1", width, -1);
    layer.decay_up = read.factor("att.time_decay_w2", layer.decay_down.columns, attention);
  } else {
    const std::array names = {"", "att.time_mix_k", "att.time_mix_v", "att.time_mix_r", "att.time_mix_g"};
    for (int mix = kMixK; mix < kMixes; ++mix) layer.mix[mix] = read.vector(names[mix], width);
    layer.decay = read.vector("att.time_decay", attention);
  }
  layer.bonus = read.vector("att.time_faaaa", attention);
  layer.receptance = read.projection("att.receptance.weight", attention, width);
  layer.key = read.projection("att.key.weight", attention, width);
  layer.value = read.projection("att.value.weight", attention, width);
  layer.output = read.projection("att.output.weight", width, attention);
  layer.gate = read.projection("att.gate.weight", attention, width);
  layer.head_norm_weight = read.vector("att.ln_x.weight", attention);
  layer.head_norm_bias = read.vector("att.ln_x.bias", attention);
  layer.ffn_mix_k = read.vector(p.finch ? "ffn.time_maa_k" : "ffn.time_mix_k", width);
  layer.ffn_mix_r = read.vector(p.finch ? "ffn.time_maa_r" : "ffn.time_mix_r", width);
  layer.ffn_key = read.projection("ffn.key.weight", p.ffn_width ? p.ffn_width : -1, width);
  layer.ffn_receptance = read.projection("ffn.receptance.weight", width, width);
  layer.ffn_value = read.projection("ffn.value.weight", width, layer.ffn_key.rows);
  return layer;
}

inline void read_weights(DecodeCall& call, WeightReader& read) {
  DecodeParams& p = call.params;
  p.ln0_weight = read.vector("blocks.0.ln0.weight", p.width), p.ln0_bias = read.vector("blocks.0.ln0.bias", p.width);
  p.ln_out_weight = read.vector("ln_out.weight", p.width), p.ln_out_bias = read.vector("ln_out.bias", p.width);
  p.head = read.projection("head.weight", -1, p.width);
  p.vocabulary = p.head.rows;
  for (int64_t index = 0; index < p.layers; ++index) {
    read.block(index);
    call.layers.push_back(layer_of(read, p));
    p.ffn_width = call.layers[0].ffn_key.rows;
  }
  read.finish();
  p.layer = call.layers.data();
}

// A part of the state [L, S, ...] that is updated in place, with its last `inner` axes contiguous.
inline StatePart state_part(const Checks& check, const char* name, const Tensor& x, int64_t inner) {
  int64_t expected = 1;
  for (int64_t axis = x.dim() - 1; axis >= x.dim() - inner; --axis) {
    if (x.size(axis) > 1 && x.stride(axis) != expected)
      fail(check.op(), ": ", name, " must have contiguous rows, because it is updated in place, got strides ",
           sizes_text(x.strides().data(), x.dim()), "; call .contiguous() once and keep the result");
    expected *= x.size(axis);
  }
  return {x.data_ptr(), storage_of(x), x.stride(0), x.stride(1)};
}

inline void read_state(DecodeCall& call, const Checks& check, const Tensor& att_shift, const Tensor& wkv,
                       const Tensor& ffn_shift, const OptionalTensor& slots) {
  DecodeParams& p = call.params;
  if (wkv.dim() != 5 || wkv.size(0) < 1 || wkv.size(4) < 1)
    fail(check.op(), ": wkv must have 5 dimensions [L, S, H, N, N], got ", shape_text(wkv));
  const int64_t sequences = slots ? wkv.size(1) : p.batch;
  p.layers = wkv.size(0), p.heads = wkv.size(2), p.head_size = wkv.size(4);
  check.shape("wkv", wkv, "[L, S, H, N, N]", {p.layers, sequences, p.heads, p.head_size, p.head_size});
  if (wkv.scalar_type() != ScalarType::Float)
    fail(check.op(), ": wkv must be float32, got ", dtype_text(wkv.scalar_type()));
  const std::pair<const char*, const Tensor&> shifts[] = {{"att_shift", att_shift}, {"ffn_shift", ffn_shift}};
  for (const auto& [name, x] : shifts) {
    check.shape(name, x, "[L, S, D]", {p.layers, sequences, p.width});
    if (!is_activation(x))
      fail(check.op(), ": ", name, " must be float32, bfloat16 or float16, got ", dtype_text(x.scalar_type()));
  }
  p.att_shift = state_part(check, "att_shift", att_shift, 1);
  p.wkv = state_part(check, "wkv", wkv, 3);
  p.ffn_shift = state_part(check, "ffn_shift", ffn_shift, 1);
  if (!slots) return;
  check.shape("slots", *slots, "[B]", {p.batch});
  if (slots->scalar_type() != ScalarType::Long)
    fail(check.op(), ": slots must be int64, got ", dtype_text(slots->scalar_type()));
  call.slots = made_contiguous(*slots);
  p.slots = static_cast<const int64_t*>(call.slots->data_ptr());
  std::vector<bool> taken(sequences);
  for (int64_t row = 0; row < p.batch; ++row) {
    const int64_t slot = p.slots[row];
    if (slot < -1 || slot >= sequences)
      fail<std::out_of_range>(check.op(), ": slots must be -1 (skip the row) or 0 to ", sequences - 1, ", got ", slot,
                              " at index ", row);
    if (slot >= 0 && taken[slot]) fail(check.op(), ": slots must not repeat, got ", slot, " again at index ", row);
    if (slot >= 0) taken[slot] = true;
  }
}

inline void check_widths(const DecodeParams& p, const char* op) {
  const std::pair<const char*, int64_t> widths[] = {
      {"D", p.width}, {"A = H * N", p.heads * p.head_size}, {"F", p.ffn_width}};
  for (const auto& [name, width] : widths)
    if (width < 32 || width % 32) fail(op, ": the width ", name, " must be a multiple of 32, got ", width);
}

inline DecodeCall prepare_decode(const char* op, bool finch, const Tensor& x, const TensorList& weights,
                                 const TensorList& scales, const Tensor& att_shift, const Tensor& wkv,
                                 const Tensor& ffn_shift, const OptionalTensor& slots) {
  if (x.dim() != 2) fail(op, ": x must have 2 dimensions [B, D], got ", shape_text(x));
  if (!is_activation(x))
    fail(op, ": x must be float32, bfloat16 or float16, got ", dtype_text(x.scalar_type()));
  if (x.size(0) > kMaxDecodeBatch)
    fail(op, ": x must have at most ", kMaxDecodeBatch, " rows, got ", x.size(0), "; take them in several calls");
  const Checks check(op, x, "x");
  DecodeCall call;
  DecodeParams& p = call.params;
  p.batch = x.size(0), p.width = x.size(1), p.finch = finch, p.storage = storage_of(x);
  read_state(call, check, att_shift, wkv, ffn_shift, slots);
  WeightReader read(op, x, weights, scales);
  read_weights(call, read);
  check_widths(p, op);
  call.x = made_contiguous(x);
  call.logits = new_empty(x, {p.batch, p.vocabulary}, x.scalar_type());
  p.x = call.x.data_ptr(), p.logits = call.logits.data_ptr();
  return call;
}

}  // namespace rwkv
