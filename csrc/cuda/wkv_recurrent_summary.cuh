// A segment seen from outside, one token at a time (per head; e = exp(-exp(w)), D and S from 1 and 0):
//   D[i] = e_t[i] D[i]        S[i,j] = e_t[i] S[i,j] + k_t[i] v_t[j]
// The adjoint is the same from the last token to the first, with r for k and dy for v.
// One block per (segment, head, slice of kColumns value columns), as in the forward kernel.
#pragma once

#include "cuda/wkv_recurrent.cuh"
#include "cuda/wkv_recurrent_forward.cuh"
#include "cuda/wkv_summary.cuh"

namespace rwkv {

template <class Real, int kSize>
__global__ void __launch_bounds__(RecurrentForwardLayout<Real, kSize>::kThreads)
    wkv_recurrent_summary_kernel(const __grid_constant__ SummaryTask task) {
  using Layout = RecurrentForwardLayout<Real, kSize>;
  constexpr int kTokens = Layout::kTokens, kThreads = Layout::kThreads, kColumns = Layout::kColumns;
  constexpr int kKeyRows = Layout::kKeyRows, kElement = sizeof(Real);
  Real* all_k = shared_array<Real>(0, 2 * kKeyRows);
  Real* all_decay = shared_array<Real>(2 * kKeyRows * kElement, 2 * kKeyRows);
  Real* all_v = shared_array<Real>(4 * kKeyRows * kElement, 2 * Layout::kValueRows);

  const WkvSummaryParams& p = task.op;
  const int slice = static_cast<int>(block_index() % Layout::kSlices);
  const int64_t head = block_index() / Layout::kSlices % p.shape.heads;
  const Segment segment = segment_of(p.shape, task.work, block_index() / Layout::kSlices / p.shape.heads);
  if (!is_wanted(task, segment)) return;
  const int64_t tokens = segment.item.tokens;

  const int lane_column = thread_index() / Layout::kKeyGroups * 4;  // of this thread in the slice
  const TilePlace place = {thread_index() % Layout::kKeyGroups * 4, slice * kColumns + lane_column};
  Tile<Real> s = {};
  Four<Real> product = {1, 1, 1, 1};

  RowsInFlight<Real, kTokens, kSize, kThreads> next_k, next_w;
  RowsInFlight<Real, kTokens, kColumns, kThreads> next_v;
  const auto request = [&](int64_t first) {  // counted from where the sum begins
    const auto ordered = [&](View view, auto& rows, int64_t column) {
      const int64_t token = p.adjoint ? tokens - 1 - first : first;
      const int64_t offset = offset_of(view, segment.row, segment.item.first_token + token, head) + column;
      if (p.adjoint) view.token_stride = -view.token_stride;
      rows.request(view, offset, tokens - first);
    };
    ordered(p.k, next_k, 0);
    ordered(p.w, next_w, 0);
    ordered(p.v, next_v, slice * kColumns);
  };
  request(0);
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int buffer = static_cast<int>(first / kTokens % 2);
    Real *k = all_k + buffer * kKeyRows, *decay = all_decay + buffer * kKeyRows;
    Real* v = all_v + buffer * Layout::kValueRows;
    next_k.arrive(k, p.k.dtype);
    next_v.arrive(v, p.v.dtype);
    next_w.arrive_as_decay(nullptr, decay, p.w.dtype, tokens - first);
    block_barrier();  // these rows are in shared memory, and the buffer filled next has been read
    request(first + kTokens);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {  // a token that is not there changes nothing
      const Four<Real> et = load_four_shared(decay + t * kSize + place.first_key);
      s = next_tile(s, et, load_four_shared(k + t * kSize + place.first_key),
                    load_four_shared(v + t * kColumns + lane_column));
#pragma unroll
      for (int a = 0; a < 4; ++a) product[a] *= et[a];
    }
  }

  const bool is_result = p.state && segment.item.segments == 1;
  const int64_t pair = (is_result ? segment.item.sequence : segment.slot) * p.shape.heads + head;
  Real* state = static_cast<Real*>(is_result ? p.state : task.segment_states);
  Real* decay = static_cast<Real*>(is_result ? p.decay : task.segment_decays);
  store_tile<kSize>(state + pair * (kSize * kSize), place, s);
  if (decay && place.first_value == 0) store_four_global(decay + pair * kSize + place.first_key, product);
}

template <class Real, int kSize>
int run_wkv_recurrent_summary(const SummaryTask& task, void* stream) {
  using Layout = RecurrentForwardLayout<Real, kSize>;
  constexpr int kBytes = 2 * (2 * Layout::kKeyRows + Layout::kValueRows) * int{sizeof(Real)};
  return launch(wkv_recurrent_summary_kernel<Real, kSize>, task.work.items * task.op.shape.heads * Layout::kSlices,
                Layout::kThreads, kBytes, task, stream);
}

}  // namespace rwkv
