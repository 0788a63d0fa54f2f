// dv of a chunk of 16 tokens. It sums over all key channels, which lie in different warps, so these exchange G = dL/dS
// after the chunk and k~, and each warp makes 16 values:
//   dv_j = G^T k~_j + sum_{i>=j} A_ij dy_i         A: the scores that forward kept
#pragma once

#include "cuda/wkv_backward_rows.cuh"
#include "cuda/wkv_backward_state.cuh"
#include "cuda/wkv_backward_tree.cuh"

namespace rwkv {

// Rows of 16-byte pieces in the exchange, [channel of 8][piece], have their pieces permuted in groups of eight, such
// that neither the writing nor the reading lanes meet in a bank.
__device__ __forceinline__ int gradient_turn(int channel) { return (channel & 1) << 2 | (channel & 2); }
__device__ __forceinline__ int key_turn(int channel) { return (channel & 3) << 1 | (channel & 1); }

// Byte offsets that every chunk needs and that depend on the lane alone; kept in shared memory, because registers are
// scarce and computing them takes longer than loading them.
struct LaneOffsets {
  int gradient_out, keys_out, gradient_in, keys_in;  // exchange: own even tile of G, own first half of k~; read
  int own_row, wide_row;                             // square_row at the warp's channels; wide_row
  int result;                                        // dr and dk on their way out
  PairPlace pair;

  template <class Layout>
  static __device__ __forceinline__ void put(const BackwardShared<Layout>& shared) {
    constexpr int kRow = Layout::kSize / 2;  // pieces of a channel of G
    const int group = lane_index() / 4, member = lane_index() % 4, warp = warp_index();
    const int first[4] = {warp % Layout::kExchangeWarps * Layout::kGradientWarpBytes +
                              (group * kRow + (member ^ gradient_turn(group))) * 16,
                          warp * Layout::kKeyWarpBytes + (group * 8 + (2 * member ^ key_turn(group))) * 16,
                          (member * kRow + 8 * warp + (group ^ gradient_turn(member))) * 16,
                          (member * 8 + (group ^ key_turn(member))) * 16};
    const int second[4] = {square_row<Layout::kPitch>() + 32 * warp, wide_row_offset<Layout>(),
                           result_offset<Layout>(), PairPlace::of_lane()};
    store_four(place(shared), first);
    store_four(place(shared) + 16 * Layout::kThreads, second);
  }
  template <class Layout>
  static __device__ __forceinline__ LaneOffsets get(const BackwardShared<Layout>& shared) {
    const uint4 first = load_shared<uint4>(place(shared));
    const uint4 second = load_shared<uint4>(place(shared) + 16 * Layout::kThreads);
    const auto offset = [](uint32_t x) { return static_cast<int>(x); };
    return {offset(first.x),  offset(first.y),  offset(first.z),  offset(first.w),
            offset(second.x), offset(second.y), offset(second.z), {offset(second.w)}};
  }

 private:
  template <class Layout>
  static __device__ __forceinline__ char* place(const BackwardShared<Layout>& shared) {
    return shared.lanes + 16 * thread_index();
  }
  template <class Layout>
  static __device__ __forceinline__ int wide_row_offset() {
    return ::rwkv::wide_row<Layout::kPitch>();
  }
  template <class Layout>
  static __device__ __forceinline__ int result_offset() {
    using Rows = WarpRows<typename Layout::Activation>;
    return Rows::place(Layout::kPitch);
  }
  static __device__ __forceinline__ void store_four(char* to, const int (&x)[4]) {
    store_shared(to, make_uint4(x[0], x[1], x[2], x[3]));
  }
};

// Tile q of G as for_each_operand visits it, to gradient_out. [channel g of the warp][value pair]{g and g + 8 of the
// first value, of the second}
__device__ __forceinline__ void publish_gradient(char* gradient, int offset, int q, const float (&x)[4]) {
  store_shared(gradient + (q % 2 ? offset ^ 64 : offset) + q / 2 * 128, make_float4(x[0], x[1], x[2], x[3]));
}

// To keys_out. [channel g of the warp][token pair]{g of both tokens, g + 8 of both tokens}
__device__ __forceinline__ void publish_keys(char* keys, int offset, const ChunkValues& k) {
  static_for<0, 2>([&](auto half) {
    constexpr int kFirst = 2 * half.value;
    store_shared(keys + (half.value ? offset ^ 16 : offset),
                 make_float4(round_tf32(k[0][kFirst]), round_tf32(k[0][kFirst + 1]), round_tf32(k[1][kFirst]),
                             round_tf32(k[1][kFirst + 1])));
  });
}

// A product for dv: row g is token 2g, row g + 8 token 2g + 1; column n of tile d is value 2n + d of the warp's 16.
struct ValueRows {
  float tile[2][4] = {};

  // + k~ G over the key channels of the published warps; gradient and keys at gradient_in and keys_in.
  template <class Layout>
  __device__ __forceinline__ void add_keys(const char* gradient, const char* keys) {
    static_for<0, Layout::kExchangeWarps>([&](auto j) {
      static_for<0, 2>([&](auto s) {  // channels 4s + t and 4s + t + 8
        const float4 k = load_shared<float4>(keys + j.value * Layout::kKeyWarpBytes + s.value * 4 * 8 * 16);
        const float4 b = load_shared<float4>(gradient + j.value * Layout::kGradientWarpBytes +
                                             s.value * 4 * (Layout::kSize / 2) * 16);
        const float a[4] = {k.x, k.y, k.z, k.w};
        mma_tf32(tile[0], a, b.x, b.y);
        mma_tf32(tile[1], a, b.z, b.w);
      });
    });
  }

  // + A^T dy; scores[half]: A of tokens 4t + 2 half and + 1 at this lane's two columns; dy: the chunk's rows.
  template <class T, int kPitch>
  __device__ __forceinline__ void add_scores(const float2 (&scores)[2][2], const char* dy) {
    const int group = lane_index() / 4, member = lane_index() % 4;
    const char* const row = dy + 2 * member * kPitch + 2 * (16 * warp_index() + 2 * group);
    static_for<0, 2>([&](auto half) {
      const float2 first = unpack<T>(load_shared<uint32_t>(row + 8 * half.value * kPitch));
      const float2 second = unpack<T>(load_shared<uint32_t>(row + (8 * half.value + 1) * kPitch));
      const float a[4] = {scores[half.value][0].x, scores[half.value][0].y, scores[half.value][1].x,
                          scores[half.value][1].y};
      mma_tf32(tile[0], a, first.x, second.x);
      mma_tf32(tile[1], a, first.y, second.y);
    });
  }

  // The lane's first row, and the first of the four values that store takes from each of two rows.
  static __device__ __forceinline__ int row() { return lane_index() / 4 * 2; }
  static __device__ __forceinline__ int value() { return 16 * warp_index() + lane_index() % 4 * 4; }
  template <class T>
  __device__ __forceinline__ void store(char* to, int64_t row_bytes, int tokens_left) const {
    static_for<0, 2>([&](auto e) {
      constexpr int kE = 2 * e.value;
      const uint2 four = make_uint2(pack<T>(tile[0][kE], tile[1][kE]), pack<T>(tile[0][kE + 1], tile[1][kE + 1]));
      if (row() + e.value < tokens_left) store_global(to + e.value * row_bytes, four);
    });
  }
};

// A of a chunk as add_scores wants it. dy is 0 past the end, so any row will do there.
__device__ __forceinline__ void load_scores(float2 (&scores)[2][2], const float* chunk, int tokens_left) {
  const float* const from = chunk + lane_index() % 4 * 4 * kTreeTokens + lane_index() / 4 * 2;
  const auto load = [&](int last) {
    static_for<0, 4>([&](auto i) {
      scores[i.value / 2][i.value % 2] = load_global<float2>(from + (i.value < last ? i.value : last) * kTreeTokens);
    });
  };
  if (tokens_left >= kTreeTokens)
    load(kTreeTokens);
  else
    load(tokens_left - 1 - lane_index() % 4 * 4);
}

}  // namespace rwkv
