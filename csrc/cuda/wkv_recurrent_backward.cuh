// The WKV recurrence, backward, one token at a time (G_t = dL/dS_t, q_t = dL/dy_t, vq_t = v_t . q_t):
//   dr_t[i] = sum_j q_t[j] S_{t-1}[i,j] + u[i] k_t[i] vq_t
//   dk_t[i] = sum_j v_t[j] G_t[i,j]     + u[i] r_t[i] vq_t      du[i] = sum_t r_t[i] k_t[i] vq_t
//   dv_t[j] = sum_i k_t[i] G_t[i,j]     + q_t[j] sum_i r_t[i] u[i] k_t[i]
//   dw_t[i] = -exp(w_t[i]) e_t[i] sum_j S_{t-1}[i,j] G_t[i,j]
//   G_{t-1}[i,j] = e_t[i] G_t[i,j] + r_t[i] q_t[j]
// dw is a sum of products that each contain e_t: nothing is subtracted, so no decay loses digits.
//
// A block takes one (segment, head) at a time. S runs forward and G backward, so states are recomputed: from the saved
// one of each 128-token chunk to one every kTokens (a sweep, into the workspace), then to every token of a few (in
// registers).
// Rows of S and G never meet but in dv, so where a whole state does not fit in the registers of a block it takes kKeys
// rows at a time, from the last token to the first, and adds their shares of dv one after another.
// N = 64 in fp32 takes 290 instructions per token-channel for the sweep and 1,110 for the way back (sm_90, counted in
// the loops, paths of other dtypes included), of which 130 and 500 are the recurrence's own multiplications and
// additions.
#pragma once

#include "cuda/wkv_recurrent.cuh"
#include "cuda/wkv_recurrent_task.h"

namespace rwkv {

template <class Real, int kSize>
struct RecurrentBackwardLayout {
  static constexpr int kTokens = sizeof(Real) == 4 ? 8 : 4;  // whose states are in registers
  static constexpr int kKeys = kSize == 64 ? 64 : 32;        // rows of the state at a time
  static constexpr int kSlices = kSize / kKeys;
  static constexpr int kValueGroups = kSize / 4;  // neighbouring lanes
  static constexpr int kKeyGroups = kKeys / 4;
  static constexpr int kThreads = kValueGroups * kKeyGroups;
  static constexpr int kSweepStates = kChunkTokens / kTokens - 1;
  static_assert(kValueGroups <= 32 && kThreads % 32 == 0 && kThreads % kSize == 0 && kThreads % kKeys == 0);
  // Shared memory, in elements.
  static constexpr int kKeyRows = kTokens * kKeys;
  static constexpr int kValueRows = kTokens * kSize;
  static constexpr int kElements = 7 * kKeyRows + (2 + kKeyGroups) * kValueRows + kKeys + 2 * kTokens;
  static constexpr int kBytes = kThreads * int{sizeof(double)} + kElements * int{sizeof(Real)};
};

// The block's buffers in shared memory.
template <class Real, int kSize>
struct RecurrentBackwardBuffers {
  using Layout = RecurrentBackwardLayout<Real, kSize>;
  double* totals = shared_array<double>(0, Layout::kThreads);
  Real* r = next(0, Layout::kKeyRows);
  Real* k = next(1 * Layout::kKeyRows, Layout::kKeyRows);
  Real* rate = next(2 * Layout::kKeyRows, Layout::kKeyRows);
  Real* decay = next(3 * Layout::kKeyRows, Layout::kKeyRows);
  Real* dr = next(4 * Layout::kKeyRows, Layout::kKeyRows);  // without the terms in u
  Real* dk = next(5 * Layout::kKeyRows, Layout::kKeyRows);
  Real* sg = next(6 * Layout::kKeyRows, Layout::kKeyRows);  // sum_j S G
  Real* v = next(7 * Layout::kKeyRows, Layout::kValueRows);
  Real* q = next(7 * Layout::kKeyRows + Layout::kValueRows, Layout::kValueRows);
  Real* dv = next(7 * Layout::kKeyRows + 2 * Layout::kValueRows, Layout::kKeyGroups * Layout::kValueRows);
  Real* u = next(7 * Layout::kKeyRows + (2 + Layout::kKeyGroups) * Layout::kValueRows, Layout::kKeys);
  Real* vq = u_end(0);
  Real* ruk = u_end(1);  // sum_i r u k over the rows of this slice

 private:
  static __device__ __forceinline__ Real* next(int elements_before, int count) {
    return shared_array<Real>(Layout::kThreads * int{sizeof(double)} + elements_before * int{sizeof(Real)}, count);
  }
  static __device__ __forceinline__ Real* u_end(int index) {
    return next(7 * Layout::kKeyRows + (2 + Layout::kKeyGroups) * Layout::kValueRows + Layout::kKeys +
                    index * Layout::kTokens,
                Layout::kTokens);
  }
};

// The rows of kTokens tokens from global to shared memory.
template <class Real, int kSize>
class RecurrentBackwardRows {
 public:
  using Layout = RecurrentBackwardLayout<Real, kSize>;

  __device__ __forceinline__ RecurrentBackwardRows(const WkvBackwardParams& op, const Segment& segment, int64_t head,
                                                   int first_key)
      : p_(op), segment_(segment), head_(head), first_key_(first_key) {}

  // What the sweep needs, and the rest.
  __device__ __forceinline__ void request_for_state(int64_t first) {
    const int64_t left = segment_.item.tokens - first;
    k_.request(p_.k, offset(p_.k, first) + first_key_, left);
    w_.request(p_.w, offset(p_.w, first) + first_key_, left);
    v_.request(p_.v, offset(p_.v, first), left);
  }
  __device__ __forceinline__ void request_rest(int64_t first) {
    const int64_t left = segment_.item.tokens - first;
    r_.request(p_.r, offset(p_.r, first) + first_key_, left);
    q_.request(p_.dy, p_.dy.data ? offset(p_.dy, first) : 0, left);
  }

  __device__ __forceinline__ void arrive_for_state(const RecurrentBackwardBuffers<Real, kSize>& to, int64_t first) {
    k_.arrive(to.k, p_.k.dtype);
    v_.arrive(to.v, p_.v.dtype);
    w_.arrive_as_decay(to.rate, to.decay, p_.w.dtype, segment_.item.tokens - first);
  }
  __device__ __forceinline__ void arrive_all(const RecurrentBackwardBuffers<Real, kSize>& to, int64_t first) {
    arrive_for_state(to, first);
    r_.arrive(to.r, p_.r.dtype);
    q_.arrive(to.q, p_.dy.dtype);
  }

 private:
  __device__ __forceinline__ int64_t offset(const View& view, int64_t first) const {
    return offset_of(view, segment_.row, segment_.item.first_token + first, head_);
  }

  const WkvBackwardParams& p_;
  const Segment& segment_;
  const int64_t head_;
  const int first_key_;
  RowsInFlight<Real, Layout::kTokens, Layout::kKeys, Layout::kThreads> r_, k_, w_;
  RowsInFlight<Real, Layout::kTokens, kSize, Layout::kThreads> v_, q_;
};

// vq_t and sum_i r_t u k_t of every token in shared memory, a warp per token.
template <class Real, int kSize>
__device__ __forceinline__ void sum_rows(const RecurrentBackwardBuffers<Real, kSize>& at) {
  using Layout = RecurrentBackwardLayout<Real, kSize>;
  for (int t = warp_index(); t < Layout::kTokens; t += Layout::kThreads / 32) {
    Real vq = 0, ruk = 0;
#pragma unroll
    for (int j = lane_index(); j < kSize; j += 32) vq += at.v[t * kSize + j] * at.q[t * kSize + j];
#pragma unroll
    for (int i = lane_index(); i < Layout::kKeys; i += 32)
      ruk += at.r[t * Layout::kKeys + i] * at.u[i] * at.k[t * Layout::kKeys + i];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      vq += shuffle_xor(vq, mask);
      ruk += shuffle_xor(ruk, mask);
    }
    if (lane_index() == 0) at.vq[t] = vq, at.ruk[t] = ruk;
  }
}

// Token t of those in shared memory, in reverse: dr, dk and sum S G of 4 keys, a share of dv, and G.
template <class Real, int kSize>
__device__ __forceinline__ void reverse_token(const RecurrentBackwardBuffers<Real, kSize>& at, int t,
                                              const TilePlace& place, const Tile<Real>& s, Tile<Real>& g) {
  using Layout = RecurrentBackwardLayout<Real, kSize>;
  const int key = t * Layout::kKeys + place.first_key, value = t * kSize + place.first_value;
  const Four<Real> r = load_four_shared(at.r + key), k = load_four_shared(at.k + key);
  const Four<Real> decay = load_four_shared(at.decay + key);
  const Four<Real> v = load_four_shared(at.v + value), q = load_four_shared(at.q + value);
  Four<Real> dr = {}, dk = {}, sg = {}, dv = {};
#pragma unroll
  for (int a = 0; a < 4; ++a) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      dr[a] += q[c] * s[a][c];
      dk[a] += v[c] * g[a][c];
      sg[a] += s[a][c] * g[a][c];
      dv[c] += k[a] * g[a][c];
      g[a][c] = decay[a] * g[a][c] + r[a] * q[c];
    }
  }
  const Real dr_sum = sum_over_lanes<Layout::kValueGroups>(dr);
  const Real dk_sum = sum_over_lanes<Layout::kValueGroups>(dk);
  const Real sg_sum = sum_over_lanes<Layout::kValueGroups>(sg);
  if (place.first_value < 16) {  // the first four lanes of the key group hold a key each
    const int mine = key + lane_index() % 4;
    at.dr[mine] = dr_sum, at.dk[mine] = dk_sum, at.sg[mine] = sg_sum;
  }
  store_four_shared(at.dv + (t * Layout::kKeyGroups + place.first_key / 4) * kSize + place.first_value, dv);
}

// A key slice of one (segment, head), from the last token to the first.
template <class Real, int kSize>
class RecurrentBackwardSlice {
 public:
  using Layout = RecurrentBackwardLayout<Real, kSize>;
  using Buffers = RecurrentBackwardBuffers<Real, kSize>;

  __device__ __forceinline__ RecurrentBackwardSlice(const RecurrentBackwardTask& task, const Segment& segment,
                                                    int64_t head, int slice, const Buffers& buffers)
      : task_(task), p_(task.op), segment_(segment), head_(head), slice_(slice), at_(buffers),
        place_{thread_index() / Layout::kValueGroups * 4, thread_index() % Layout::kValueGroups * 4},
        rows_(task.op, segment, head, slice * Layout::kKeys) {}

  __device__ __forceinline__ void run() {
    const int64_t sequence = segment_.item.sequence, tokens = segment_.item.tokens;
    if (thread_index() < Layout::kKeys)
      at_.u[thread_index()] = load_element<Real>(p_.u, head_ * p_.u.head_stride + first_key() + thread_index());
    Tile<Real> g = {};
    if (!segment_.is_last())
      g = load_tile<kSize>(state_at(task_.segment_dstates, segment_.slot), place_);
    else if (p_.dstate_out)
      g = load_tile<kSize>(state_at(p_.dstate_out, sequence), place_);
    for (int64_t chunk = chunks_of(tokens) - 1; chunk >= 0; --chunk) reverse_chunk(chunk, g);
    if (segment_.is_first() && p_.dstate) store_tile<kSize>(state_at(p_.dstate, sequence), place_, g);
    store_partial(du_, task_.du_partial);
    if (p_.shape.constant_decay) store_partial(dw_, task_.dw_partial);
  }

 private:
  __device__ __forceinline__ int first_key() const { return slice_ * Layout::kKeys; }
  __device__ __forceinline__ int key_of_thread() const { return thread_index() % Layout::kKeys; }

  // This slice's rows of the state that belongs to (index, head).
  __device__ __forceinline__ Real* state_at(const void* states, int64_t index) const {
    return static_cast<Real*>(const_cast<void*>(states)) + (index * p_.shape.heads + head_) * (kSize * kSize) +
           first_key() * kSize;
  }
  // The state before block `block` of the chunk.
  __device__ __forceinline__ Real* block_state(int64_t chunk, int block) const {
    if (block == 0) return state_at(p_.chunk_states, segment_.first_chunk + chunk);
    return static_cast<Real*>(task_.block_states) +
           (block_index() * Layout::kSweepStates + block - 1) * (kSize * kSize) + first_key() * kSize;
  }

  __device__ __forceinline__ void reverse_chunk(int64_t chunk, Tile<Real>& g) {
    const int64_t first = chunk * kChunkTokens, left = segment_.item.tokens - first;
    const int tokens = static_cast<int>(left < kChunkTokens ? left : kChunkTokens);
    const int blocks = (tokens + Layout::kTokens - 1) / Layout::kTokens;
    sweep(chunk, blocks);
    rows_.request_rest(first + (blocks - 1) * Layout::kTokens);
    Real du = 0, dw = 0;
    for (int block = blocks - 1; block >= 0; --block) {
      const int64_t token = first + block * Layout::kTokens;
      rows_.arrive_all(at_, token);
      block_barrier();  // the rows are in shared memory
      if (block > 0) {
        rows_.request_for_state(token - Layout::kTokens);
        rows_.request_rest(token - Layout::kTokens);
      }
      sum_rows<Real, kSize>(at_);
      reverse_block(block_state(chunk, block), g);
      block_barrier();  // every thread's sums are in shared memory
      // No barrier after these: a thread reads only those elements of the rows that it writes itself when the next ones
      // arrive, and the sums are written again after the barrier that follows.
      store_keys(token, du, dw);
      store_values(token);
    }
    du_ += du, dw_ += dw;  // fp32 sums stay inside a chunk
  }

  // Forward through the chunk, keeping the state before each block but the first, which the forward op saved. The
  // last block's rows are on their way at the end.
  __device__ __forceinline__ void sweep(int64_t chunk, int blocks) {
    const int64_t first = chunk * kChunkTokens;
    Tile<Real> s = load_tile<kSize>(block_state(chunk, 0), place_);
    rows_.request_for_state(first);
    for (int block = 0; block + 1 < blocks; ++block) {
      const int64_t token = first + block * Layout::kTokens;
      rows_.arrive_for_state(at_, token);
      block_barrier();  // the rows are in shared memory
      rows_.request_for_state(token + Layout::kTokens);
#pragma unroll
      for (int t = 0; t < Layout::kTokens; ++t) s = state_after(t, s);
      store_tile<kSize>(block_state(chunk, block + 1), place_, s);
      block_barrier();  // the rows have been read
    }
  }

  __device__ __forceinline__ Tile<Real> state_after(int t, const Tile<Real>& s) const {
    const int key = t * Layout::kKeys + place_.first_key;
    return next_tile(s, load_four_shared(at_.decay + key), load_four_shared(at_.k + key),
                     load_four_shared(at_.v + t * kSize + place_.first_value));
  }

  __device__ __forceinline__ void reverse_block(const Real* state, Tile<Real>& g) {
    Tile<Real> s[Layout::kTokens];  // before each token; each thread reads what it wrote itself
    s[0] = load_tile<kSize>(state, place_);
#pragma unroll
    for (int t = 0; t + 1 < Layout::kTokens; ++t) s[t + 1] = state_after(t, s[t]);
#pragma unroll
    for (int t = Layout::kTokens - 1; t >= 0; --t) reverse_token<Real, kSize>(at_, t, place_, s[t], g);
  }

  // dr, dk, dw of the tokens in shared memory; a thread's elements all belong to one key.
  __device__ __forceinline__ void store_keys(int64_t token, Real& du, Real& dw) const {
    const int key = key_of_thread();
    const int64_t left = segment_.item.tokens - token, place = segment_.item.first_token + token;
    const Real u = at_.u[key];
#pragma unroll
    for (int t = thread_index() / Layout::kKeys; t < Layout::kTokens; t += Layout::kThreads / Layout::kKeys) {
      if (t >= left) break;
      const int at = t * Layout::kKeys + key;
      const Real r = at_.r[at], k = at_.k[at], vq = at_.vq[t];
      const auto offset = [&](const View& view) {
        return offset_of(view, segment_.row, place + t, head_) + first_key() + key;
      };
      store_element(p_.dr, offset(p_.dr), at_.dr[at] + u * k * vq);
      store_element(p_.dk, offset(p_.dk), at_.dk[at] + u * r * vq);
      // Where exp(w) is inf the decay is 0 and so is the gradient.
      const Real gradient = at_.decay[at] == Real(0) ? Real(0) : -at_.rate[at] * (at_.decay[at] * at_.sg[at]);
      if (p_.dw.data) store_element(p_.dw, offset(p_.dw), gradient);
      du += r * k * vq;
      dw += gradient;
    }
  }

  // dv of the tokens in shared memory: the shares of the key groups in their order, after those of earlier slices.
  __device__ __forceinline__ void store_values(int64_t token) const {
    const int value = thread_index() % kSize;
    const int64_t left = segment_.item.tokens - token, place = segment_.item.first_token + token;
#pragma unroll
    for (int t = thread_index() / kSize; t < Layout::kTokens; t += Layout::kThreads / kSize) {
      if (t >= left) break;
      Real sum = at_.ruk[t] * at_.q[t * kSize + value];
#pragma unroll
      for (int group = 0; group < Layout::kKeyGroups; ++group)
        sum += at_.dv[(t * Layout::kKeyGroups + group) * kSize + value];
      const int64_t offset = offset_of(p_.dv, segment_.row, place + t, head_) + value;
      Real* share = dv_share(place + t, value, offset);
      if (slice_ > 0) sum += load_global<Real>(share);
      if (slice_ + 1 < Layout::kSlices)
        store_global<Real>(share, sum);
      else
        store_element(p_.dv, offset, sum);
    }
  }

  // Where the slices add up an element of dv: in dv itself if it is Real.
  __device__ __forceinline__ Real* dv_share(int64_t token, int value, int64_t offset) const {
    if (!task_.dv_shares) return static_cast<Real*>(p_.dv.data) + offset;
    const int64_t row = (segment_.row * p_.shape.tokens + token) * p_.shape.heads + head_;
    return static_cast<Real*>(task_.dv_shares) + row * kSize + value;
  }

  // One number per key: the sum over the threads of that key.
  __device__ __forceinline__ void store_partial(double mine, void* partial) const {
    at_.totals[thread_index()] = mine;
    block_barrier();  // every thread's total is in shared memory
    if (thread_index() < Layout::kKeys) {
      double sum = 0;
      for (int thread = thread_index(); thread < Layout::kThreads; thread += Layout::kKeys) sum += at_.totals[thread];
      const int64_t row = (segment_.slot * p_.shape.heads + head_) * kSize;
      store_global<Real>(static_cast<Real*>(partial) + row + first_key() + thread_index(), static_cast<Real>(sum));
    }
    block_barrier();  // the totals have been read
  }

  const RecurrentBackwardTask& task_;
  const WkvBackwardParams& p_;
  const Segment& segment_;
  const int64_t head_;
  const int slice_;
  const Buffers& at_;
  const TilePlace place_;  // its keys count from the slice's first
  RecurrentBackwardRows<Real, kSize> rows_;
  double du_ = 0, dw_ = 0;
};

template <class Real, int kSize>
__global__ void __launch_bounds__(RecurrentBackwardLayout<Real, kSize>::kThreads)
    wkv_recurrent_backward_kernel(const __grid_constant__ RecurrentBackwardTask task) {
  const RecurrentBackwardBuffers<Real, kSize> buffers;
  for (int64_t pair = block_index(); pair < task.work.items * task.op.shape.heads; pair += task.blocks) {
    const int64_t head = pair % task.op.shape.heads;
    const Segment segment = segment_of(task.op.shape, task.work, pair / task.op.shape.heads);
    if (segment.item.sequence < 0) continue;
    for (int slice = 0; slice < RecurrentBackwardLayout<Real, kSize>::kSlices; ++slice)
      RecurrentBackwardSlice<Real, kSize>(task, segment, head, slice, buffers).run();
  }
}

template <class Real, int kSize>
int run_wkv_recurrent_backward(const RecurrentBackwardTask& task, void* stream) {
  using Layout = RecurrentBackwardLayout<Real, kSize>;
  return launch(wkv_recurrent_backward_kernel<Real, kSize>, task.blocks, Layout::kThreads, Layout::kBytes, task,
                stream);
}

template <class Real, int kSize>
int wkv_recurrent_backward_needs(RecurrentBackwardNeeds& needs) {
  using Layout = RecurrentBackwardLayout<Real, kSize>;
  needs.scratch_bytes = Layout::kSweepStates * kSize * kSize * int64_t{sizeof(Real)};
  needs.dv_shares = Layout::kSlices > 1;
  return resident_blocks(wkv_recurrent_backward_kernel<Real, kSize>, Layout::kThreads, Layout::kBytes, needs.pairs);
}

}  // namespace rwkv
