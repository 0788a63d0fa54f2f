// The summary ops' part of wkv_prepare.h. Both ops fill one struct: the adjoint's r and dy stand where k and v do.
#pragma once

#include "wkv_prepare.h"

namespace rwkv {

struct SummaryCall {
  WkvSummaryParams params;
  Tensor k, v, w, decay, state;
  OptionalTensor cu_seqlens;
};

inline SummaryCall prepare_summary(const char* op, Decay decay, bool adjoint, const Tensor& k, const Tensor& v,
                                   const Tensor& w, const OptionalTensor& cu_seqlens) {
  const Checks check(op, k, adjoint ? "r" : "k");
  check.rank("[B, T, H, N]", 4);
  check.activation();
  check.same_shape_and_dtype(adjoint ? "dy" : "v", v);
  check_decay(check, decay, k, w);

  SummaryCall call;
  WkvSummaryParams& p = call.params;
  call.k = with_unit_last_stride(k), call.v = with_unit_last_stride(v), call.w = with_unit_last_stride(w);
  call.cu_seqlens = contiguous(cu_seqlens);
  p.k = view_of(call.k), p.v = view_of(call.v), p.w = view_of(call.w);
  p.shape = shape_of(check, decay, k, call.cu_seqlens);
  p.adjoint = adjoint;
  const int64_t sequences = p.shape.sequences, heads = p.shape.heads, size = p.shape.head_size;
  call.state = new_empty(k, {sequences, heads, size, size}, check.state_dtype());
  p.state = call.state.data_ptr();
  if (!adjoint) {
    call.decay = new_empty(k, {sequences, heads, size}, check.state_dtype());
    p.decay = call.decay.data_ptr();
  }
  return call;
}

}  // namespace rwkv
