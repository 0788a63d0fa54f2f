// What the recurrent kernels share: they take one token at a time in fp32 or fp64 (Real), for every activation dtype.
// A thread keeps a tile of 4 keys by 4 values of the state in registers; the tokens' rows pass through shared memory, a
// few tokens at a time, and the next rows are on their way while these are used.
#pragma once

#include "cuda/device_launch.h"
#include "cuda/element.cuh"
#include "cuda/wkv_work.h"

namespace rwkv {

template <class Real>
using Tile = Four<Four<Real>>;  // [key][value]

// kTokens rows of kWidth channels on their way from a tensor to shared memory [kTokens][kWidth].
template <class Real, int kTokens, int kWidth, int kThreads>
class RowsInFlight {
 public:
  // Asks for the rows whose first element is at offset; those from `tokens` on are not there and arrive as 0.
  __device__ __forceinline__ void request(const View& view, int64_t offset, int64_t tokens) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      raw_[n] = {};
      if (is_inside(n) && token_of(n) < tokens && view.data)
        raw_[n] = load_raw<Real>(view, offset + token_of(n) * view.token_stride + index_of(n) % kWidth);
    }
  }

  __device__ __forceinline__ void arrive(Real* to, Dtype dtype) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n)
      if (is_inside(n)) to[index_of(n)] = element_value(raw_[n], dtype);
  }

  // exp(w) and exp(-exp(w)) instead of w; 0 and 1, which change nothing, for the rows that are not there.
  __device__ __forceinline__ void arrive_as_decay(Real* rate, Real* decay, Dtype dtype, int64_t tokens) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      if (!is_inside(n)) continue;
      const Real growth = token_of(n) < tokens ? exponential(element_value(raw_[n], dtype)) : Real(0);
      if (rate) rate[index_of(n)] = growth;
      decay[index_of(n)] = exponential(-growth);
    }
  }

 private:
  static constexpr int kAll = kTokens * kWidth;
  static constexpr int kCount = (kAll + kThreads - 1) / kThreads;
  static __device__ __forceinline__ int index_of(int n) { return n * kThreads + thread_index(); }
  static __device__ __forceinline__ int token_of(int n) { return index_of(n) / kWidth; }
  static __device__ __forceinline__ bool is_inside(int n) { return kAll % kThreads == 0 || index_of(n) < kAll; }

  RawElement<Real> raw_[kCount];
};

// Where a thread's tile lies in a state [kSize][kSize]: keys first_key .. + 3, values first_value .. + 3.
struct TilePlace {
  int first_key;
  int first_value;
};

template <int kSize, class Real>
__device__ __forceinline__ Tile<Real> load_tile(const Real* state, const TilePlace& place) {
  Tile<Real> tile;
#pragma unroll
  for (int a = 0; a < 4; ++a) tile[a] = load_four_global(state + (place.first_key + a) * kSize + place.first_value);
  return tile;
}

template <int kSize, class Real>
__device__ __forceinline__ void store_tile(Real* state, const TilePlace& place, const Tile<Real>& tile) {
#pragma unroll
  for (int a = 0; a < 4; ++a) store_four_global(state + (place.first_key + a) * kSize + place.first_value, tile[a]);
}

// S = e S + k v for the tile.
template <class Real>
__device__ __forceinline__ Tile<Real> next_tile(const Tile<Real>& s, const Four<Real>& decay, const Four<Real>& k,
                                                const Four<Real>& v) {
  Tile<Real> next;
#pragma unroll
  for (int a = 0; a < 4; ++a)
#pragma unroll
    for (int c = 0; c < 4; ++c) next[a][c] = decay[a] * s[a][c] + k[a] * v[c];
  return next;
}

// Sums x over groups of kLanes neighbouring lanes, 4 <= kLanes <= 32: a lane gets the sum of x[lane % 4].
template <int kLanes, class Real>
__device__ __forceinline__ Real sum_over_lanes(const Four<Real>& x) {
  const bool high = lane_index() & 2, odd = lane_index() & 1;
  const Real low_share = (high ? x[2] : x[0]) + shuffle_xor(high ? x[0] : x[2], 2);
  const Real high_share = (high ? x[3] : x[1]) + shuffle_xor(high ? x[1] : x[3], 2);
  Real total = (odd ? high_share : low_share) + shuffle_xor(odd ? low_share : high_share, 1);
#pragma unroll
  for (int mask = 4; mask < kLanes; mask *= 2) total += shuffle_xor(total, mask);
  return total;
}

}  // namespace rwkv
