// The ops on CPU tensors: one (sequence, head) pair is one piece of work, or several where there are fewer pairs than
// threads; no sum is taken in another order for it, so results do not depend on the number of threads.
#include "cpu/wkv_kernels.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "build_info.h"
#include "cpu/denormals.h"
#include "cpu/instruction_set.h"
#include "wkv_prepare.h"
#include "wkv_prepare_summary.h"

namespace rwkv {
namespace {

const WkvKernels& kernels() {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512: return kWkvAvx512;
    case InstructionSet::kAvx2: return kWkvAvx2;
#endif
    default: return kWkvGeneric;
  }
}

std::vector<Sequence> sequences_of(const char* op, const WkvShape& shape) {
  std::vector<Sequence> sequences(shape.sequences);
  if (!shape.cu_seqlens) {
    for (int64_t row = 0; row < shape.batch; ++row)
      sequences[row] = {row, row, 0, shape.tokens, row * chunks_of(shape.tokens)};
    return sequences;
  }
  const auto bound = [&](int64_t i) -> int64_t {
    return shape.cu_seqlens_int64 ? static_cast<const int64_t*>(shape.cu_seqlens)[i]
                                  : static_cast<const int32_t*>(shape.cu_seqlens)[i];
  };
  if (bound(0) != 0) fail(op, ": cu_seqlens must start with 0, got ", bound(0));
  if (bound(shape.sequences) != shape.tokens)
    fail(op, ": cu_seqlens must end with T = ", shape.tokens, ", got ", bound(shape.sequences));
  int64_t chunk = 0;
  for (int64_t i = 0; i < shape.sequences; ++i) {
    const int64_t first = bound(i), end = bound(i + 1);
    if (end < first) fail(op, ": cu_seqlens must not decrease, got ", first, " before ", end, " at index ", i + 1);
    if (end > shape.tokens)
      fail(op, ": cu_seqlens must not exceed T = ", shape.tokens, ", got ", end, " at index ", i + 1);
    sequences[i] = {i, 0, first, end - first, chunk};
    chunk += chunks_of(end - first);
  }
  return sequences;
}

// Pieces of work below about 32k multiply-adds stay on the calling thread: starting the others costs more.
int64_t grain_of(const WkvShape& shape) {
  const int64_t tokens = shape.batch * shape.tokens / std::max<int64_t>(shape.sequences, 1) + 1;
  return std::max<int64_t>(1, 32768 / (tokens * shape.head_size * shape.head_size));
}

// How many parts the value columns of a head are divided into, so that every thread has one.
int64_t column_parts(const WkvShape& shape) {
  const int64_t pairs = std::max<int64_t>(1, shape.sequences * shape.heads), threads = thread_count();
  const int64_t units = (shape.head_size + kColumnUnit - 1) / kColumnUnit;
  return std::clamp<int64_t>((threads + pairs - 1) / pairs, 1, std::max<int64_t>(1, units));
}

// Calls body(sequence, head, columns) for all of them, `parts` pieces of columns each.
template <class Body>
void for_each_head(const std::vector<Sequence>& sequences, const WkvShape& shape, int64_t parts, const Body& body) {
  const int64_t units = (shape.head_size + kColumnUnit - 1) / kColumnUnit;
  const auto border = [&](int64_t part) { return std::min(shape.head_size, part * units / parts * kColumnUnit); };
  const int64_t grain = std::max<int64_t>(1, grain_of(shape) / parts);
  parallel_for(shape.sequences * shape.heads * parts, grain, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t pair = item / parts, first = border(item % parts);
      body(sequences[pair / shape.heads], pair % shape.heads, Columns{first, border(item % parts + 1) - first});
    }
  });
}

// total[h, i] = sum over sequences, in their order, of partial[s, h, i], stored in total's dtype.
void reduce_sequences(const std::vector<double>& partial, const WkvShape& shape, Tensor total) {
  const int64_t count = shape.heads * shape.head_size;
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t s = 0; s < shape.sequences; ++s) sum += partial[s * count + i];
    switch (total.scalar_type()) {
      case ScalarType::Double: static_cast<double*>(total.data_ptr())[i] = sum; break;
      case ScalarType::BFloat16: static_cast<c10::BFloat16*>(total.data_ptr())[i] = c10::BFloat16(float(sum)); break;
      case ScalarType::Half: static_cast<c10::Half*>(total.data_ptr())[i] = c10::Half(float(sum)); break;
      default: static_cast<float*>(total.data_ptr())[i] = float(sum);
    }
  }
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <Decay kDecay>
Forward forward(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                const OptionalTensor& state, const OptionalTensor& cu_seqlens, bool save_for_backward) {
  const char* op = kDecay == Decay::kEagle ? "wkv5" : "wkv6";
  const ForwardCall call = prepare_forward(op, kDecay, r, k, v, w, u, state, cu_seqlens, save_for_backward);
  if (save_for_backward && call.params.shape.cu_seqlens)  // the slots that these lengths leave unused
    std::memset(call.chunk_states.data_ptr(), 0, call.chunk_states.numel() * call.chunk_states.element_size());
  const WkvShape& shape = call.params.shape;
  for_each_head(sequences_of(op, shape), shape, column_parts(shape),
                [&](const auto&... task) { kernels().forward(call.params, task...); });
  return {call.y, call.state_out, call.chunk_states, call.scores};
}

template <Decay kDecay>
Backward backward(const OptionalTensor& dy, const OptionalTensor& dstate_out, const Tensor& r, const Tensor& k,
                  const Tensor& v, const Tensor& w, const Tensor& u, const OptionalTensor& state,
                  const OptionalTensor& cu_seqlens, const Tensor& chunk_states, const Tensor& scores) {
  const char* op = kDecay == Decay::kEagle ? "wkv5_backward" : "wkv6_backward";
  BackwardCall call =
      prepare_backward(op, kDecay, dy, dstate_out, r, k, v, w, u, state, cu_seqlens, chunk_states, scores);
  const WkvShape& shape = call.params.shape;
  std::vector<double> du(shape.sequences * shape.heads * shape.head_size), dw(shape.constant_decay ? du.size() : 0);
  call.params.du_partial = du.data();
  call.params.dw_partial = shape.constant_decay ? dw.data() : nullptr;
  const std::vector<Sequence> sequences = sequences_of(op, shape);
  // Two parts take longer than the whole: what finish_backward() does comes on top.
  const int64_t parts = column_parts(shape) > 2 ? column_parts(shape) : 1;
  OptionalTensor partial_sums;
  if (parts > 1) {
    partial_sums = new_empty(r, {kernels().partial_sums(shape)}, shape.fp64 ? ScalarType::Double : ScalarType::Float);
    call.params.partial_sums = partial_sums->data_ptr();
  }
  for_each_head(sequences, shape, parts, [&](const auto&... task) { kernels().backward(call.params, task...); });
  if (parts > 1)
    for_each_head(sequences, shape, 1, [&](const Sequence& sequence, int64_t head, Columns) {
      kernels().finish_backward(call.params, sequence, head);
    });
  reduce_sequences(du, shape, call.du);
  if (shape.constant_decay) reduce_sequences(dw, shape, call.dw);
  return {call.dr, call.dk, call.dv, call.dw, call.du, call.dstate};
}

SummaryCall summarise(const char* op, Decay decay, bool adjoint, const Tensor& k, const Tensor& v, const Tensor& w,
                      const OptionalTensor& cu_seqlens) {
  SummaryCall call = prepare_summary(op, decay, adjoint, k, v, w, cu_seqlens);
  const WkvShape& shape = call.params.shape;
  for_each_head(sequences_of(op, shape), shape, column_parts(shape),
                [&](const auto&... task) { kernels().summary(call.params, task...); });
  return call;
}

template <Decay kDecay>
std::tuple<Tensor, Tensor> summary(const Tensor& k, const Tensor& v, const Tensor& w,
                                   const OptionalTensor& cu_seqlens) {
  const char* op = kDecay == Decay::kEagle ? "wkv5_summary" : "wkv6_summary";
  const SummaryCall call = summarise(op, kDecay, false, k, v, w, cu_seqlens);
  return {call.decay, call.state};
}

template <Decay kDecay>
Tensor adjoint_summary(const Tensor& r, const Tensor& w, const Tensor& dy, const OptionalTensor& cu_seqlens) {
  const char* op = kDecay == Decay::kEagle ? "wkv5_adjoint_summary" : "wkv6_adjoint_summary";
  return summarise(op, kDecay, true, r, dy, w, cu_seqlens).state;
}

template <Decay kDecay>
Tensor step(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, Tensor state,
            const OptionalTensor& slots) {
  const char* op = kDecay == Decay::kEagle ? "wkv5_step" : "wkv6_step";
  const StepCall call = prepare_step(op, kDecay, r, k, v, w, u, state, slots);
  const WkvStepParams& p = call.params;
  std::vector<bool> taken(p.slots ? p.shape.sequences : 0);
  for (int64_t row = 0; p.slots && row < p.shape.batch; ++row) {
    const int64_t slot = p.slots[row];
    if (slot < -1 || slot >= p.shape.sequences)
      fail<std::out_of_range>(op, ": slots must be -1 (skip the row) or 0 to ", p.shape.sequences - 1, ", got ", slot,
                              " at index ", row);
    if (slot >= 0 && taken[slot]) fail(op, ": slots must not repeat, got ", slot, " again at index ", row);
    if (slot >= 0) taken[slot] = true;
  }
  parallel_for(p.shape.batch * p.shape.heads, grain_of(p.shape), [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (int64_t item = begin; item < end; ++item) kernels().step(p, item / p.shape.heads, item % p.shape.heads);
  });
  return call.y;
}

}  // namespace

const char* cpu_instruction_set() { return kernels().instruction_set; }

}  // namespace rwkv

STABLE_TORCH_LIBRARY_IMPL(rwkv_ext, CPU, m) {
  using rwkv::Decay;
  m.impl("wkv5_forward", TORCH_BOX(&rwkv::forward<Decay::kEagle>));
  m.impl("wkv6_forward", TORCH_BOX(&rwkv::forward<Decay::kFinch>));
  m.impl("wkv5_backward", TORCH_BOX(&rwkv::backward<Decay::kEagle>));
  m.impl("wkv6_backward", TORCH_BOX(&rwkv::backward<Decay::kFinch>));
  m.impl("wkv5_summary", TORCH_BOX(&rwkv::summary<Decay::kEagle>));
  m.impl("wkv6_summary", TORCH_BOX(&rwkv::summary<Decay::kFinch>));
  m.impl("wkv5_adjoint_summary", TORCH_BOX(&rwkv::adjoint_summary<Decay::kEagle>));
  m.impl("wkv6_adjoint_summary", TORCH_BOX(&rwkv::adjoint_summary<Decay::kFinch>));
  m.impl("wkv5_step", TORCH_BOX(&rwkv::step<Decay::kEagle>));
  m.impl("wkv6_step", TORCH_BOX(&rwkv::step<Decay::kFinch>));
}
