// Rows of the backward kernel's tensors on their way between global and shared memory.
// A segment has less than 2^31 tokens: its scores alone would fill 128 GiB.
#pragma once

#include "cuda/wkv_backward_layout.cuh"

namespace rwkv {

// ---- inputs: a stage at a time, by the whole block ----

// Two or one raw decay parameters that leave everything as it is: exp(-inf) = 0, so w = 1.
template <class W>
__device__ __forceinline__ uint32_t no_decay();
template <>
__device__ __forceinline__ uint32_t no_decay<BFloat16>() { return 0xff80ff80u; }
template <>
__device__ __forceinline__ uint32_t no_decay<Float16>() { return 0xfc00fc00u; }
template <>
__device__ __forceinline__ uint32_t no_decay<float>() { return 0xff800000u; }

// Starts copying a stage's rows of one tensor, 16 bytes a thread. token: the stage's first; wanted: how many of its
// tokens exist. What lies beyond the end gets `beyond`, or zeros. The caller commits and waits.
template <class Layout, class E, int kPitch>
__device__ __forceinline__ void copy_stage(char* to, const E* start, int64_t token_stride, int token, int wanted,
                                           uint32_t beyond = 0) {
  constexpr int kPieces = Layout::kSize * static_cast<int>(sizeof(E)) / 16;  // of a row
  constexpr int kRowsAtOnce = Layout::kThreads / kPieces;
  const int row = thread_index() / kPieces, piece = thread_index() % kPieces;
  const int64_t row_bytes = token_stride * static_cast<int64_t>(sizeof(E));
  const char* source =
      reinterpret_cast<const char*>(start) + static_cast<uint32_t>(token + row) * row_bytes + 16 * piece;
  static_assert(kRowsAtOnce == 8 || kRowsAtOnce == 16);  // one step between tokens is one step between rows
  char* const target = to + row_of_token(row) * kPitch + 16 * piece;
  if (wanted >= Layout::kTokens) {
    static_for<0, Layout::kTokens / kRowsAtOnce>([&](auto n) {
      copy_async(target + row_of_token(n.value * kRowsAtOnce) * kPitch, source);
      source += kRowsAtOnce * row_bytes;
    });
  } else {
#pragma unroll 1
    for (int chunk = 0; chunk < Layout::kTokens; chunk += kTreeTokens)
      static_for<0, kTreeTokens / kRowsAtOnce>([&](auto n) {
        char* const to_row = target + (chunk + row_of_token(n.value * kRowsAtOnce)) * kPitch;
        if (row + chunk + n.value * kRowsAtOnce < wanted)
          copy_async(to_row, source);
        else
          store_shared(to_row, make_uint4(beyond, beyond, beyond, beyond));
        source += kRowsAtOnce * row_bytes;
      });
  }
}

// ---- outputs: a chunk at a time, by each warp its 16 channels ----

// dw of a chunk takes the place of w.
template <class Layout>
__device__ __forceinline__ void store_decay_gradient(char* rows, const ChunkValues& dlogw,
                                                     const ChunkValues& exponent) {
  using W = typename Layout::Decay;
  ChunkValues dw;
  static_for<0, 8>([&](auto i) {
    dw[i.value / 4][i.value % 4] =
        decay_gradient(exponent[i.value / 4][i.value % 4], dlogw[i.value / 4][i.value % 4]);
  });
  if constexpr (sizeof(W) == 2) {
    store_chunk<W>(rows + square_row<Layout::kDecayPitch>() + 32 * warp_index(), dw);
  } else {
    char* const own = rows + row_of_token(lane_index() % 4 * 4) * Layout::kDecayPitch +
                      4 * (16 * warp_index() + lane_index() / 4);
    static_for<0, 8>([&](auto i) {
      store_shared(own + row_of_token(i.value % 4) * Layout::kDecayPitch + i.value / 4 * 32,
                   dw[i.value / 4][i.value % 4]);
    });
  }
}

// A lane's 16 bytes of a row, and its rows. Eight lanes read shared memory at a time, in different banks: their rows
// are two apart, or four where a row has four pieces.
template <class E>
struct WarpRows {
  static constexpr int kPieces = static_cast<int>(sizeof(E));  // of a row: 16 channels
  static constexpr int kRowsAtOnce = 32 / kPieces;

  static __device__ __forceinline__ int row() {
    const int lane = lane_index();
    return kPieces == 2 ? lane % 8 / 2 * 2 + lane / 8 % 2 + lane / 16 * 8 : lane % 8 / 4 * 4 + lane / 8;
  }
  static __device__ __forceinline__ int token() { return token_of_row(row()); }
  static __device__ __forceinline__ int byte() {
    return 16 * warp_index() * static_cast<int>(sizeof(E)) + lane_index() % kPieces * 16;
  }
  static __device__ __forceinline__ int place(int pitch) { return row() * pitch + byte(); }
  // From shared to global memory.
  static __device__ __forceinline__ void store(char* to, int64_t row_bytes, const char* from, int pitch,
                                               int tokens_left) {
    static_for<0, kTreeTokens / kRowsAtOnce>([&](auto n) {
      constexpr int kRow = n.value * kRowsAtOnce, kToken = token_of_row(kRow);
      const uint4 piece = load_shared<uint4>(from + kRow * pitch);
      if (token() + kToken < tokens_left) store_global(to + kToken * row_bytes, piece);
    });
  }
};

// One output's rows in global memory, chunk by chunk towards the first token.
template <class E>
struct OutputRows {
  char* at = nullptr;  // the lane's place in the current chunk; Eagle has no rows of dw
  int64_t row_bytes;

  __device__ __forceinline__ OutputRows(const View& view, const Segment& segment, int64_t head, int64_t token, int row,
                                        int byte)
      : row_bytes(view.token_stride * static_cast<int64_t>(sizeof(E))) {
    if (view.data) at = reinterpret_cast<char*>(start_of<E>(view, segment, head)) + (token + row) * row_bytes + byte;
  }
  __device__ __forceinline__ void previous_chunk() { at -= kTreeTokens * row_bytes; }
};

}  // namespace rwkv
