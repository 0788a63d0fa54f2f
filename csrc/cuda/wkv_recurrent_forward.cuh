// The WKV recurrence, forward, one token at a time (e = exp(-exp(w)), per head):
//   y_t[j]   = sum_i r_t[i] (S_{t-1}[i,j] + u[i] k_t[i] v_t[j])
//   S_t[i,j] = e_t[i] S_{t-1}[i,j] + k_t[i] v_t[j]
// One block per (segment, head, slice of kColumns value columns): columns of the state never meet. The keys of a column
// lie in one warp, so that y is a sum over lanes.
// N = 64 in fp32 takes 630 instructions per token-channel (sm_90, counted in the main loop, paths of other dtypes
// included), of which 190 are the recurrence's own multiplications and additions.
#pragma once

#include "cuda/wkv_recurrent.cuh"

namespace rwkv {

template <class Real, int kSize>
struct RecurrentForwardLayout {
  static constexpr int kColumns = kSize == 64 ? 64 : 32;
  static constexpr int kSlices = kSize / kColumns;
  static constexpr int kKeyGroups = kSize / 4;  // neighbouring lanes
  static constexpr int kThreads = kKeyGroups * (kColumns / 4);
  static constexpr int kTokens = 8;  // in shared memory at a time
  static_assert(kKeyGroups <= 32 && kThreads % 32 == 0 && kThreads >= 4 * kTokens && kChunkTokens % kTokens == 0);
  // Shared memory: two buffers each, one being filled while the other is read.
  static constexpr int kKeyRows = kTokens * kSize;
  static constexpr int kValueRows = kTokens * kColumns;
  static constexpr int kBytes = 2 * (3 * kKeyRows + kValueRows) * int{sizeof(Real)};
};

// The backward kernel that goes with this one has no use for scores; they are 0 rather than left to chance.
__device__ __forceinline__ void clear_scores(const WkvForwardParams& p, const Segment& segment, int64_t head,
                                             int64_t first, int count, int64_t tokens) {
  const int64_t row = (segment.row * p.shape.heads + head) * p.shape.tokens + segment.item.first_token + first;
  const int t = thread_index() / 4;
  if (t < count && first + t < tokens)
    store_global<float4>(static_cast<float*>(p.scores) + row * kScoresPerToken + thread_index() * 4,
                         make_float4(0, 0, 0, 0));
}

template <class Real, int kSize>
__global__ void __launch_bounds__(RecurrentForwardLayout<Real, kSize>::kThreads)
    wkv_recurrent_forward_kernel(const __grid_constant__ ForwardTask task) {
  using Layout = RecurrentForwardLayout<Real, kSize>;
  constexpr int kTokens = Layout::kTokens, kThreads = Layout::kThreads, kColumns = Layout::kColumns;
  constexpr int kKeyRows = Layout::kKeyRows, kElement = sizeof(Real);
  Real* all_r = shared_array<Real>(0, 2 * kKeyRows);
  Real* all_k = shared_array<Real>(2 * kKeyRows * kElement, 2 * kKeyRows);
  Real* all_decay = shared_array<Real>(4 * kKeyRows * kElement, 2 * kKeyRows);
  Real* all_v = shared_array<Real>(6 * kKeyRows * kElement, 2 * Layout::kValueRows);

  const WkvForwardParams& p = task.op;
  const int slice = static_cast<int>(block_index() % Layout::kSlices);
  const int64_t head = block_index() / Layout::kSlices % p.shape.heads;
  const Segment segment = segment_of(p.shape, task.work, block_index() / Layout::kSlices / p.shape.heads);
  if (segment.item.sequence < 0) return;
  const int64_t tokens = segment.item.tokens;

  const int lane_column = thread_index() / Layout::kKeyGroups * 4;  // of this thread in the slice
  const TilePlace place = {thread_index() % Layout::kKeyGroups * 4, slice * kColumns + lane_column};
  const auto state_at = [&](const void* states, int64_t index) {
    return static_cast<Real*>(const_cast<void*>(states)) + (index * p.shape.heads + head) * (kSize * kSize);
  };
  Tile<Real> s = {};
  if (!segment.is_first())
    s = load_tile<kSize>(state_at(task.segment_states, segment.slot), place);
  else if (p.state)
    s = load_tile<kSize>(state_at(p.state, segment.item.sequence), place);
  Four<Real> u;
#pragma unroll
  for (int a = 0; a < 4; ++a) u[a] = load_element<Real>(p.u, head * p.u.head_stride + place.first_key + a);

  RowsInFlight<Real, kTokens, kSize, kThreads> next_r, next_k, next_w;
  RowsInFlight<Real, kTokens, kColumns, kThreads> next_v;
  const auto request = [&](int64_t first) {
    const auto offset = [&](const View& view) {
      return offset_of(view, segment.row, segment.item.first_token + first, head);
    };
    next_r.request(p.r, offset(p.r), tokens - first);
    next_k.request(p.k, offset(p.k), tokens - first);
    next_w.request(p.w, offset(p.w), tokens - first);
    next_v.request(p.v, offset(p.v) + slice * kColumns, tokens - first);
  };
  request(0);
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int buffer = static_cast<int>(first / kTokens % 2);
    Real *r = all_r + buffer * kKeyRows, *k = all_k + buffer * kKeyRows, *decay = all_decay + buffer * kKeyRows;
    Real* v = all_v + buffer * Layout::kValueRows;
    next_r.arrive(r, p.r.dtype);
    next_k.arrive(k, p.k.dtype);
    next_v.arrive(v, p.v.dtype);
    next_w.arrive_as_decay(nullptr, decay, p.w.dtype, tokens - first);
    block_barrier();  // these rows are in shared memory, and the buffer filled next has been read
    request(first + kTokens);
    if (p.chunk_states && first % kChunkTokens == 0)
      store_tile<kSize>(state_at(p.chunk_states, segment.first_chunk + first / kChunkTokens), place, s);

    const int64_t y_offset = offset_of(p.y, segment.row, segment.item.first_token + first, head);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (first + t >= tokens) break;
      const Four<Real> rt = load_four_shared(r + t * kSize + place.first_key);
      const Four<Real> kt = load_four_shared(k + t * kSize + place.first_key);
      const Four<Real> et = load_four_shared(decay + t * kSize + place.first_key);
      const Four<Real> vt = load_four_shared(v + t * kColumns + lane_column);
      Real current = 0;  // sum of r u k
      Four<Real> y = {};
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        current += rt[a] * (u[a] * kt[a]);
#pragma unroll
        for (int c = 0; c < 4; ++c) y[c] += rt[a] * s[a][c];
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) y[c] += current * vt[c];
      s = next_tile(s, et, kt, vt);
      const Real column = sum_over_lanes<Layout::kKeyGroups>(y);
      if (place.first_key < 16)  // the first four lanes of the column group hold a column each
        store_element(p.y, y_offset + t * p.y.token_stride + place.first_value + lane_index() % 4, column);
    }
    if (p.scores && slice == 0) clear_scores(p, segment, head, first, kTokens, tokens);
  }
  if (segment.is_last()) store_tile<kSize>(state_at(p.state_out, segment.item.sequence), place, s);
}

template <class Real, int kSize>
int run_wkv_recurrent_forward(const ForwardTask& task, void* stream) {
  using Layout = RecurrentForwardLayout<Real, kSize>;
  return launch(wkv_recurrent_forward_kernel<Real, kSize>, task.work.items * task.op.shape.heads * Layout::kSlices,
                Layout::kThreads, Layout::kBytes, task, stream);
}

// How many (segment, head) pairs the device works on at once.
template <class Real, int kSize>
int wkv_recurrent_forward_blocks(int64_t& pairs) {
  using Layout = RecurrentForwardLayout<Real, kSize>;
  const int error =
      resident_blocks(wkv_recurrent_forward_kernel<Real, kSize>, Layout::kThreads, Layout::kBytes, pairs);
  pairs /= Layout::kSlices;
  return error;
}

}  // namespace rwkv
