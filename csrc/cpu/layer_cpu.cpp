// The layer's ops on CPU tensors: checks, outputs, and work cut into pieces by shape alone, so that results do not
// depend on the number of threads.
#include <memory>
#include <tuple>
#include <utility>

#include "cpu/layer_host.h"

namespace rwkv {
namespace {

Tensor cross_entropy_rows(Tensor logits, const Tensor& targets, double l2wrap, bool overwrite) {
  const char* op = "cross_entropy_rows";
  const Checks check(op, logits, "logits");
  check.activation();
  if (logits.dim() != 2 || logits.size(1) < 1)
    fail(op, ": logits must have shape [rows, V] with V >= 1, got ", shape_text(logits));
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  if (vocab > 1 && logits.stride(1) != 1)
    fail(op, ": logits must have a unit last stride, because they are changed in place, got strides ",
         sizes_text(logits.strides().data(), 2), "; call .contiguous() and keep the result");
  check.shape("targets", targets, "[rows]", {rows});
  if (targets.scalar_type() != ScalarType::Long)
    fail(op, ": targets must be int64, got ", dtype_text(targets.scalar_type()), "; use .long()");
  const Tensor own_targets = made_contiguous(targets);
  Tensor loss = new_empty(logits, {rows}, check.state_dtype());
  CrossEntropyParams p;
  p.dtype = dtype_of(logits), p.vocab = vocab, p.row_stride = logits.stride(0);
  p.logits = logits.data_ptr(), p.loss = loss.data_ptr();
  p.targets = static_cast<const int64_t*>(own_targets.data_ptr());
  p.l2wrap = l2wrap, p.overwrite = overwrite;
  for (int64_t row = 0; row < rows; ++row)
    if (p.targets[row] < 0 || p.targets[row] >= vocab)
      fail<std::out_of_range>(op, ": targets must be from 0 to V - 1 = ", vocab - 1, ", got ", p.targets[row],
                              " at index ", row);
  parallel_for(rows, grain_of(vocab), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[size_t(vocab)]);
    kernels().cross_entropy(p, begin, end, scratch.get());
  });
  return loss;
}

// The tensors of a mix that params point to.
struct MixCall {
  MixParams params;
  Tensor h, weights;
  OptionalTensor last;
  Tensors low;
  std::vector<const void*> low_data;
  std::vector<int64_t> starts_of;
};

void mark_starts(const char* op, MixCall& call, const OptionalTensor& cu_seqlens) {
  const MixParams& p = call.params;
  call.starts_of.assign(p.tokens, -1);
  if (!cu_seqlens) {
    for (int64_t token = 0; token < p.tokens; token += p.tokens_per_row)
      call.starts_of[token] = token / p.tokens_per_row;
    return;
  }
  const Tensor bounds = made_contiguous(*cu_seqlens);
  const bool wide = bounds.scalar_type() == ScalarType::Long;
  const auto bound = [&](int64_t i) -> int64_t {
    return wide ? static_cast<const int64_t*>(bounds.data_ptr())[i] : static_cast<const int32_t*>(bounds.data_ptr())[i];
  };
  const int64_t sequences = bounds.size(0) - 1;
  if (bound(0) != 0) fail(op, ": cu_seqlens must start with 0, got ", bound(0));
  if (bound(sequences) != p.tokens)
    fail(op, ": cu_seqlens must end with T = ", p.tokens, ", got ", bound(sequences));
  for (int64_t i = 0; i < sequences; ++i) {
    if (bound(i + 1) < bound(i) || bound(i + 1) > p.tokens)
      fail(op, ": cu_seqlens must not decrease, got ", bound(i), " before ", bound(i + 1), " at index ", i + 1);
    if (bound(i + 1) > bound(i)) call.starts_of[bound(i)] = i;
  }
}

MixCall prepare_mix(const char* op, const Tensor& h, const OptionalTensor& last, const Tensor& weights,
                    const Tensors& low, const OptionalTensor& cu_seqlens, bool weighs_current) {
  const Checks check(op, h, "h");
  check.activation();
  if (h.dim() != 3) fail(op, ": h must have 3 dimensions [B, T, D], got ", shape_text(h));
  const int64_t batch = h.size(0), tokens = h.size(1), width = h.size(2);
  if (cu_seqlens) check.cu_seqlens(*cu_seqlens);
  if (weights.dim() != 2) fail(op, ": weights must have 2 dimensions [C, D], got ", shape_text(weights));
  check.shape("weights", weights, "[C, D]", {weights.size(0), width});
  check.parameter_dtype("weights", weights);
  const int64_t sequences = cu_seqlens ? cu_seqlens->size(0) - 1 : batch;
  if (last) {
    check.shape("last", *last, cu_seqlens ? "[sequences, D]" : "[B, D]", {sequences, width});
    check.same_dtype("last", *last);
  }
  if (!low.empty() && int64_t(low.size()) != weights.size(0))
    fail(op, ": low must hold C = ", weights.size(0), " tensors or none, got ", low.size());
  MixCall call;
  for (const Tensor& x : low) {
    check.same_shape_and_dtype("low", x);
    call.low.push_back(made_contiguous(x));
    call.low_data.push_back(call.low.back().data_ptr());
  }
  call.h = with_unit_last_stride(h), call.weights = real_copy(check, weights);
  if (last) call.last = made_contiguous(*last);
  MixParams& p = call.params;
  p.dtype = dtype_of(h), p.tokens = batch * tokens, p.tokens_per_row = tokens, p.width = width;
  p.count = weights.size(0), p.weighs_current = weighs_current;
  p.h = call.h.data_ptr(), p.h_row_stride = call.h.stride(0), p.h_token_stride = call.h.stride(1);
  p.last = call.last ? call.last->data_ptr() : nullptr;
  p.weights = call.weights.data_ptr();
  mark_starts(op, call, cu_seqlens);
  return call;
}

Tensors shift_mix(const Tensor& h, const OptionalTensor& last, const Tensor& weights, Tensors low,
                  const OptionalTensor& cu_seqlens, bool weighs_current) {
  MixCall call = prepare_mix("shift_mix", h, last, weights, low, cu_seqlens, weighs_current);
  MixParams& p = call.params;
  Tensors out;
  std::vector<void*> out_data;
  for (int64_t c = 0; c < p.count; ++c) {
    out.push_back(new_empty(h, {h.size(0), h.size(1), p.width}, h.scalar_type()));
    out_data.push_back(out.back().data_ptr());
  }
  p.out = out_data.data(), p.low = call.low.empty() ? nullptr : call.low_data.data();
  p.starts_of = call.starts_of.data();
  parallel_for(p.tokens, grain_of(p.width * (1 + p.count)),
               [&](int64_t begin, int64_t end) { kernels().mix(p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensors> shift_mix_backward(Tensors dmixed, const Tensor& h,
                                                               const OptionalTensor& last, const Tensor& weights,
                                                               Tensors low, const OptionalTensor& cu_seqlens,
                                                               bool weighs_current) {
  const char* op = "shift_mix_backward";
  MixCall call = prepare_mix(op, h, last, weights, low, cu_seqlens, weighs_current);
  MixParams& p = call.params;
  const Checks check(op, h, "h");
  if (int64_t(dmixed.size()) != p.count)
    fail(op, ": dmixed must hold C = ", p.count, " tensors, got ", dmixed.size());
  std::vector<const void*> dout_data;
  for (Tensor& x : dmixed) {
    check.same_shape_and_dtype("dmixed", x);
    x = made_contiguous(x);
    dout_data.push_back(x.data_ptr());
  }
  Tensors dlow;
  std::vector<void*> dlow_data;
  for (size_t c = 0; c < low.size(); ++c) {
    dlow.push_back(new_empty(h, {h.size(0), h.size(1), p.width}, h.scalar_type()));
    dlow_data.push_back(dlow.back().data_ptr());
  }
  Tensor dh = new_empty(h, {h.size(0), h.size(1), p.width}, h.scalar_type());
  Tensor dlast = last ? new_empty(h, {last->size(0), p.width}, h.scalar_type()) : new_empty(h, {0}, h.scalar_type());
  if (last) set_zero(dlast);
  const int64_t blocks = blocks_of(p.tokens);
  const Tensor partial = new_empty(h, {blocks, 1, p.count * p.width}, check.state_dtype());
  p.low = call.low.empty() ? nullptr : call.low_data.data(), p.starts_of = call.starts_of.data();
  p.dout = dout_data.data(), p.dlow = dlow.empty() ? nullptr : dlow_data.data();
  p.dh = dh.data_ptr(), p.dlast = last ? dlast.data_ptr() : nullptr, p.partial = partial.data_ptr();
  for_rows(blocks, 1, (2 * kMixGroup + 1) * p.width, [&](int64_t begin, int64_t end, double* scratch) {
    for (int64_t block = begin; block < end; ++block) kernels().mix_backward(p, block, scratch);
  });
  return {dh, dlast, sum_of_blocks(partial, 0, weights), dlow};
}

// The tensors of a head norm that params point to.
struct HeadNormCall {
  HeadNormParams params;
  Tensor y, gate, weight, bias;
};

HeadNormCall prepare_head_norm(const char* op, const Tensor& y, const Tensor& weight, const Tensor& bias,
                               const Tensor& gate, double eps) {
  const Checks check(op, y, "y");
  check.activation();
  check.rank("[M, H, N]", 3);
  const int64_t rows = y.size(0), heads = y.size(1), size = y.size(2);
  for (const auto& [name, x] : {std::pair<const char*, const Tensor&>("weight", weight), {"bias", bias}}) {
    check.shape(name, x, "[H * N]", {heads * size});
    check.parameter_dtype(name, x);
  }
  check.shape("gate", gate, "[M, H * N]", {rows, heads * size});
  check.same_dtype("gate", gate);
  HeadNormCall call{{}, made_contiguous(y), made_contiguous(gate), real_copy(check, weight), real_copy(check, bias)};
  HeadNormParams& p = call.params;
  p.dtype = dtype_of(y), p.rows = rows, p.heads = heads, p.head_size = size, p.eps = eps;
  p.y = call.y.data_ptr(), p.gate = call.gate.data_ptr();
  p.weight = call.weight.data_ptr(), p.bias = call.bias.data_ptr();
  return call;
}

Tensor head_norm_gate(const Tensor& y, const Tensor& weight, const Tensor& bias, const Tensor& gate, double eps) {
  HeadNormCall call = prepare_head_norm("head_norm_gate", y, weight, bias, gate, eps);
  HeadNormParams& p = call.params;
  const int64_t width = p.heads * p.head_size;
  Tensor out = new_empty(y, {p.rows, width}, y.scalar_type());
  p.out = out.data_ptr();
  for_rows(p.rows, grain_of(2 * width), width,
           [&](int64_t begin, int64_t end, double* scratch) { kernels().head_norm_gate(p, begin, end, scratch); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_norm_gate_backward(const Tensor& dout, const Tensor& y,
                                                                   const Tensor& weight, const Tensor& bias,
                                                                   const Tensor& gate, double eps) {
  const char* op = "head_norm_gate_backward";
  HeadNormCall call = prepare_head_norm(op, y, weight, bias, gate, eps);
  HeadNormParams& p = call.params;
  const int64_t width = p.heads * p.head_size, blocks = blocks_of(p.rows);
  const Checks check(op, y, "y");
  check.shape("dout", dout, "[M, H * N]", {p.rows, width});
  check.same_dtype("dout", dout);
  const Tensor own_dout = made_contiguous(dout);
  Tensor dy = new_empty(y, {p.rows, p.heads, p.head_size}, y.scalar_type());
  Tensor dgate = new_empty(y, {p.rows, width}, y.scalar_type());
  const Tensor partial = new_empty(y, {blocks, 2, width}, check.state_dtype());
  p.dout = own_dout.data_ptr(), p.dy = dy.data_ptr(), p.dgate = dgate.data_ptr(), p.partial = partial.data_ptr();
  for_rows(blocks, 1, 2 * width, [&](int64_t begin, int64_t end, double* scratch) {
    for (int64_t block = begin; block < end; ++block) kernels().head_norm_gate_backward(p, block, scratch);
  });
  return {dy, sum_of_blocks(partial, 0, weight), sum_of_blocks(partial, 1, bias), dgate};
}

// Checks a, b and dout (which may be null) of a pointwise op, and keeps them contiguous.
struct PointwiseCall {
  PointwiseParams params;
  Tensors kept;

  PointwiseCall(const char* op, const char* name, const Tensor& a) : check_(op, a, name) {
    check_.activation();
    params.dtype = dtype_of(a), params.count = a.numel();
    params.a = keep(a);
  }
  const void* input(const char* name, const Tensor& x) {
    check_.same_shape_and_dtype(name, x);
    return keep(x);
  }
  Tensor output(const Tensor& like, void*& data) {
    Tensor out = contiguous_like(like);
    data = out.data_ptr();
    return out;
  }
  template <class Kernel>
  void run(const Kernel& kernel) const {
    parallel_for(params.count, 16384, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  }

 private:
  const void* keep(const Tensor& x) {
    kept.push_back(made_contiguous(x));
    return kept.back().data_ptr();
  }
  const Checks check_;
};

Tensor squared_relu(const Tensor& x) {
  PointwiseCall call("squared_relu", "x", x);
  const Tensor out = call.output(x, call.params.out);
  call.run(kernels().squared_relu);
  return out;
}

Tensor squared_relu_backward(const Tensor& dout, const Tensor& x) {
  PointwiseCall call("squared_relu_backward", "x", x);
  call.params.dout = call.input("dout", dout);
  const Tensor dx = call.output(x, call.params.da);
  call.run(kernels().squared_relu_backward);
  return dx;
}

Tensor sigmoid_gate(const Tensor& gate, const Tensor& x) {
  PointwiseCall call("sigmoid_gate", "gate", gate);
  call.params.b = call.input("x", x);
  const Tensor out = call.output(x, call.params.out);
  call.run(kernels().sigmoid_gate);
  return out;
}

std::tuple<Tensor, Tensor> sigmoid_gate_backward(const Tensor& dout, const Tensor& gate, const Tensor& x) {
  PointwiseCall call("sigmoid_gate_backward", "gate", gate);
  call.params.b = call.input("x", x), call.params.dout = call.input("dout", dout);
  const Tensor dgate = call.output(gate, call.params.da), dx = call.output(x, call.params.db);
  call.run(kernels().sigmoid_gate_backward);
  return {dgate, dx};
}

void accumulate(Tensor total, const Tensor& part, bool first) {
  PointwiseCall call("accumulate", "part", part);
  const Checks check("accumulate", part, "part");
  check.same_shape("total", total);
  check.state_dtype("total", total);
  if (!total.is_contiguous())
    fail("accumulate: total must be contiguous, because it is changed in place, got strides ",
         sizes_text(total.strides().data(), total.dim()), "; call .contiguous() and keep the result");
  call.params.out = total.data_ptr(), call.params.b = first ? nullptr : call.params.out;
  call.run(kernels().accumulate);
}

}  // namespace
}  // namespace rwkv

STABLE_TORCH_LIBRARY_IMPL(rwkv_ext, CPU, m) {
  m.impl("cross_entropy_rows", TORCH_BOX(&rwkv::cross_entropy_rows));
  m.impl("shift_mix", TORCH_BOX(&rwkv::shift_mix));
  m.impl("shift_mix_backward", TORCH_BOX(&rwkv::shift_mix_backward));
  m.impl("head_norm_gate", TORCH_BOX(&rwkv::head_norm_gate));
  m.impl("head_norm_gate_backward", TORCH_BOX(&rwkv::head_norm_gate_backward));
  m.impl("squared_relu", TORCH_BOX(&rwkv::squared_relu));
  m.impl("squared_relu_backward", TORCH_BOX(&rwkv::squared_relu_backward));
  m.impl("sigmoid_gate", TORCH_BOX(&rwkv::sigmoid_gate));
  m.impl("accumulate", TORCH_BOX(&rwkv::accumulate));
  m.impl("sigmoid_gate_backward", TORCH_BOX(&rwkv::sigmoid_gate_backward));
}
