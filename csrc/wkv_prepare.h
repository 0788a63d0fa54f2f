// Validates an op's tensors, allocates its outputs and fills its params: one copy of this for every backend.
// A *Call owns what its params point to. The decay kind follows from the op: Finch has w [B, T, H, N], Eagle w [H, N].
#pragma once

#include "checks.h"
#include "torch_api.h"
#include "wkv_params.h"

namespace rwkv {

enum class Decay { kEagle, kFinch };

struct ForwardCall {
  WkvForwardParams params;
  Tensor r, k, v, w, u, y, state_out, chunk_states, scores;
  OptionalTensor state, cu_seqlens;
};

struct BackwardCall {
  WkvBackwardParams params;
  Tensor r, k, v, w, u, dr, dk, dv, dw, du, dstate, chunk_states, scores;
  OptionalTensor dy, dstate_out, cu_seqlens;
};

struct StepCall {
  WkvStepParams params;
  Tensor r, k, v, w, u, y;
  OptionalTensor slots;
};

inline View view_of(const Tensor& x) {  // [B, T, H, N], or [H, N] repeated over B and T
  View view{x.data_ptr(), dtype_of(x), 0, 0, 0};
  if (x.dim() == 4) view.batch_stride = x.stride(0), view.token_stride = x.stride(1), view.head_stride = x.stride(2);
  if (x.dim() == 3) view.batch_stride = x.stride(0), view.head_stride = x.stride(1);
  if (x.dim() == 2) view.head_stride = x.stride(0);
  return view;
}

inline OptionalTensor contiguous(const OptionalTensor& x) {
  return x ? OptionalTensor(made_contiguous(*x)) : x;
}

inline void check_decay(const Checks& check, Decay decay, const Tensor& like, const Tensor& w) {
  if (decay == Decay::kEagle)
    check.shape("w", w, "[H, N]", {like.size(like.dim() - 2), like.size(like.dim() - 1)});
  else
    check.same_shape("w", w);
  check.parameter_dtype("w", w);
}

inline void check_inputs(const Checks& check, Decay decay, const Tensor& r, const Tensor& k, const Tensor& v,
                         const Tensor& w, const Tensor& u) {
  check.activation();
  check.same_shape_and_dtype("k", k);
  check.same_shape_and_dtype("v", v);
  check_decay(check, decay, r, w);
  check.shape("u", u, "[H, N]", {r.size(r.dim() - 2), r.size(r.dim() - 1)});
  check.parameter_dtype("u", u);
}

// Checks the five inputs that every op has, keeps them in the call and points its params at them.
template <class Call>
void take_inputs(Call& call, const Checks& check, Decay decay, const Tensor& r, const Tensor& k, const Tensor& v,
                 const Tensor& w, const Tensor& u) {
  check_inputs(check, decay, r, k, v, w, u);
  call.r = with_unit_last_stride(r), call.k = with_unit_last_stride(k), call.v = with_unit_last_stride(v);
  call.w = with_unit_last_stride(w), call.u = with_unit_last_stride(u);
  auto& p = call.params;
  p.r = view_of(call.r), p.k = view_of(call.k), p.v = view_of(call.v), p.w = view_of(call.w), p.u = view_of(call.u);
}

inline WkvShape shape_of(const Checks& check, Decay decay, const Tensor& r, const OptionalTensor& cu_seqlens) {
  WkvShape shape;
  shape.batch = r.size(0), shape.tokens = r.size(1), shape.heads = r.size(2), shape.head_size = r.size(3);
  shape.sequences = shape.batch;
  shape.chunks = shape.batch * chunks_of(shape.tokens);
  if (cu_seqlens) {
    check.cu_seqlens(*cu_seqlens);
    shape.sequences = cu_seqlens->size(0) - 1;
    shape.chunks = chunks_of(shape.tokens) + shape.sequences - 1;  // the most that any lengths with this sum can need
    shape.cu_seqlens = cu_seqlens->data_ptr();
    shape.cu_seqlens_int64 = cu_seqlens->scalar_type() == ScalarType::Long;
  }
  shape.constant_decay = decay == Decay::kEagle;
  shape.fp64 = r.scalar_type() == ScalarType::Double;
  return shape;
}

inline void check_state(const Checks& check, const char* name, const Tensor& state, const WkvShape& shape) {
  check.shape(name, state, shape.cu_seqlens ? "[sequences, H, N, N]" : "[B, H, N, N]",
              {shape.sequences, shape.heads, shape.head_size, shape.head_size});
  check.state_dtype(name, state);
}

// The CUDA kernels for 16-bit activations keep a 16-token chunk's products of r and k as well. The fake in
// rwkv_ext/_registration.py says the same.
inline bool has_scores(const Tensor& r) {
  return r.is_cuda() && (r.scalar_type() == ScalarType::BFloat16 || r.scalar_type() == ScalarType::Half);
}

inline ForwardCall prepare_forward(const char* op, Decay decay, const Tensor& r, const Tensor& k, const Tensor& v,
                                   const Tensor& w, const Tensor& u, const OptionalTensor& state,
                                   const OptionalTensor& cu_seqlens, bool save_for_backward) {
  const Checks check(op, r);
  check.rank("[B, T, H, N]", 4);
  ForwardCall call;
  WkvForwardParams& p = call.params;
  take_inputs(call, check, decay, r, k, v, w, u);
  call.cu_seqlens = contiguous(cu_seqlens);
  p.shape = shape_of(check, decay, r, call.cu_seqlens);
  if (state) check_state(check, "state", *state, p.shape);

  const int64_t heads = p.shape.heads, size = p.shape.head_size;
  call.state = contiguous(state);
  call.y = new_empty(r, {p.shape.batch, p.shape.tokens, heads, size}, r.scalar_type());
  call.state_out = new_empty(r, {p.shape.sequences, heads, size, size}, check.state_dtype());
  if (!save_for_backward)
    call.chunk_states = new_empty(r, {0}, check.state_dtype());
  else if (cu_seqlens)
    call.chunk_states = new_empty(r, {p.shape.chunks, heads, size, size}, check.state_dtype());
  else
    call.chunk_states =
        new_empty(r, {p.shape.batch, chunks_of(p.shape.tokens), heads, size, size}, check.state_dtype());
  call.scores = save_for_backward && has_scores(r)
                    ? new_empty(r, {p.shape.batch, heads, p.shape.tokens, kScoresPerToken}, ScalarType::Float)
                    : new_empty(r, {0}, check.state_dtype());

  p.y = view_of(call.y);
  p.state = call.state ? call.state->data_ptr() : nullptr;
  p.state_out = call.state_out.data_ptr();
  p.chunk_states = save_for_backward ? call.chunk_states.data_ptr() : nullptr;
  p.scores = call.scores.numel() ? call.scores.data_ptr() : nullptr;
  return call;
}

inline BackwardCall prepare_backward(const char* op, Decay decay, const OptionalTensor& dy,
                                     const OptionalTensor& dstate_out, const Tensor& r, const Tensor& k,
                                     const Tensor& v, const Tensor& w, const Tensor& u, const OptionalTensor& state,
                                     const OptionalTensor& cu_seqlens, const Tensor& chunk_states,
                                     const Tensor& scores) {
  const Checks check(op, r);
  check.rank("[B, T, H, N]", 4);
  BackwardCall call;
  WkvBackwardParams& p = call.params;
  take_inputs(call, check, decay, r, k, v, w, u);
  call.cu_seqlens = contiguous(cu_seqlens);
  p.shape = shape_of(check, decay, r, call.cu_seqlens);
  if (dy) check.same_shape_and_dtype("dy", *dy);
  if (dstate_out) check_state(check, "dstate_out", *dstate_out, p.shape);
  if (state) check_state(check, "state", *state, p.shape);
  const int64_t heads = p.shape.heads, size = p.shape.head_size;
  check.device("chunk_states", chunk_states);
  check.state_dtype("chunk_states", chunk_states);
  if (chunk_states.numel() != p.shape.chunks * heads * size * size)
    fail(check.op(), ": chunk_states must hold ", p.shape.chunks, " states of [H, N, N] = ", "[", heads, ", ", size,
         ", ", size, "], got shape ", shape_text(chunk_states), "; run the forward op with save_for_backward = true");
  check.device("scores", scores);
  if (has_scores(r)) {
    check.shape("scores", scores, "[B, H, T, 16]", {p.shape.batch, heads, p.shape.tokens, kScoresPerToken});
    if (scores.scalar_type() != ScalarType::Float)
      fail(check.op(), ": scores must be float32, got ", dtype_text(scores.scalar_type()));
  }

  if (dy) call.dy = with_unit_last_stride(*dy);
  call.dstate_out = contiguous(dstate_out);
  call.chunk_states = made_contiguous(chunk_states);
  call.scores = made_contiguous(scores);
  const auto like_r = [&] { return new_empty(r, {p.shape.batch, p.shape.tokens, heads, size}, r.scalar_type()); };
  call.dr = like_r(), call.dk = like_r(), call.dv = like_r();
  call.dw = decay == Decay::kEagle ? new_empty(w, {heads, size}, w.scalar_type())
                                   : new_empty(w, {p.shape.batch, p.shape.tokens, heads, size}, w.scalar_type());
  call.du = new_empty(u, {heads, size}, u.scalar_type());
  call.dstate = state ? new_empty(r, {p.shape.sequences, heads, size, size}, check.state_dtype())
                      : new_empty(r, {0}, check.state_dtype());

  if (call.dy) p.dy = view_of(*call.dy);
  p.dr = view_of(call.dr), p.dk = view_of(call.dk), p.dv = view_of(call.dv);
  if (decay == Decay::kFinch) p.dw = view_of(call.dw);
  p.dstate_out = call.dstate_out ? call.dstate_out->data_ptr() : nullptr;
  p.chunk_states = call.chunk_states.data_ptr();
  p.scores = has_scores(r) ? call.scores.data_ptr() : nullptr;
  p.dstate = state ? call.dstate.data_ptr() : nullptr;
  return call;
}

inline StepCall prepare_step(const char* op, Decay decay, const Tensor& r, const Tensor& k, const Tensor& v,
                             const Tensor& w, const Tensor& u, const Tensor& state, const OptionalTensor& slots) {
  const Checks check(op, r);
  check.rank("[B, H, N]", 3);
  StepCall call;
  WkvStepParams& p = call.params;
  take_inputs(call, check, decay, r, k, v, w, u);
  p.shape.batch = r.size(0), p.shape.tokens = 1, p.shape.heads = r.size(1), p.shape.head_size = r.size(2);
  p.shape.constant_decay = decay == Decay::kEagle;
  p.shape.fp64 = r.scalar_type() == ScalarType::Double;
  const int64_t heads = p.shape.heads, size = p.shape.head_size;
  p.shape.sequences = slots && state.dim() > 0 ? state.size(0) : p.shape.batch;
  check.shape("state", state, slots ? "[slots, H, N, N]" : "[B, H, N, N]", {p.shape.sequences, heads, size, size});
  check.state_dtype("state", state);
  if (!state.is_contiguous())
    fail(op, ": state must be contiguous, because it is updated in place, got strides ",
         sizes_text(state.strides().data(), state.dim()), "; call .contiguous() once and keep the result");
  if (slots) {
    check.shape("slots", *slots, "[B]", {p.shape.batch});
    if (slots->scalar_type() != ScalarType::Long)
      fail(op, ": slots must be int64, got ", dtype_text(slots->scalar_type()));
  }
  call.slots = contiguous(slots);
  call.y = new_empty(r, {p.shape.batch, heads, size}, r.scalar_type());
  p.y = view_of(call.y);
  p.state = state.data_ptr();
  p.slots = call.slots ? static_cast<const int64_t*>(call.slots->data_ptr()) : nullptr;
  return call;
}

}  // namespace rwkv
