// Shared memory of the backward kernel, and how a chunk of 16 tokens is spread over a warp.
//
// Warp n of a block owns key channels 16 n to 16 n + 15. Lane (g, t), g = lane / 4 and t = lane % 4, has channels g and
// g + 8 of these and the four tokens 4 t to 4 t + 3, its quad: ChunkValues. Every matrix product with tokens along a
// dimension takes them in one order, in which row 8 h + 2 t + e of a fragment is token 4 t + 2 h + e. So the two halves
// (h) of a fragment are the lane's own tokens, and products over two or four tokens need no exchange between lanes.
#pragma once

#include "cuda/decay.cuh"
#include "cuda/static_for.h"
#include "cuda/wkv_work.h"

namespace rwkv {

// An operand of mma_tf32, which cuts off what tf32 does not hold. fp16 would show that and bf16 does not.
template <class T>
__device__ __forceinline__ float tf32_operand(float x) {
  return std::is_same_v<T, Float16> ? round_tf32(x) : x;
}

using ChunkValues = float[2][4];  // [channel g or g + 8][token of the quad]

// Byte offsets and sizes. A stage is what a block holds in shared memory at once: kChunks chunks. The rows of a
// chunk lie in the order of the fragments (row_of_token) and have an odd number of 16-byte pieces: the eight rows of a
// matrix are neighbours and in different banks.
template <class T, class W, int kHeadSize, bool kConstant>
struct BackwardLayout {
  using Activation = T;
  using Decay = W;
  static constexpr int kSize = kHeadSize;
  static constexpr bool kConstantDecay = kConstant;
  static constexpr int kWarps = kSize / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = kSize <= 64 ? 2 : 1;  // wanted on a multiprocessor
  static constexpr int kChunks = kSize <= 64 ? 4 : 2;
  static constexpr int kTokens = kChunks * kTreeTokens;
  static constexpr int kStagesBefore = static_cast<int>(kChunkTokens) / kTokens - 1;  // at most, since a kept state

  static constexpr int kPitch = 2 * kSize + 16;
  static constexpr int kDecayPitch = static_cast<int>(sizeof(W)) * kSize + 16;
  static constexpr int kRowsBytes = kTokens * kPitch;
  static constexpr int kDecayRowsBytes = kConstantDecay ? 0 : kTokens * kDecayPitch;

  // Scores of pairs of tokens, B = dy v^T: [chunk][half of the first token][lane] 16 bytes, and zeros.
  static constexpr int kPairBytes = 2 * 32 * 16;
  static constexpr int kZeroBytes = kPairBytes / 2 + 16;
  static constexpr int kNearBytes = 4 * 8 * 4;  // [quad][8]: pairs within two tokens and the diagonal, per chunk

  // What warps exchange for dv: G of up to four warps, and k~.
  static constexpr int kExchangeWarps = kWarps < 4 ? kWarps : 4;
  static constexpr int kExchangeRounds = kWarps / kExchangeWarps;
  static constexpr int kGradientWarpBytes = 16 * kSize * 4;
  static constexpr int kGradientBytes = kExchangeWarps * kGradientWarpBytes;
  static constexpr int kKeyWarpBytes = 16 * kTreeTokens * 4;
  static constexpr int kKeyBytes = kWarps * kKeyWarpBytes;
  static constexpr int kStateBytes = kSize * kSize * 4;  // the state at the start of the stage

  // Until the state has reached the stage, the same place has k, v and w of the tokens before it.
  static constexpr int kRowsBefore = kStagesBefore * kTokens;
  static constexpr int kKeyBefore = 0;
  static constexpr int kValueBefore = kRowsBefore * kPitch;
  static constexpr int kDecayBefore = 2 * kRowsBefore * kPitch;
  static constexpr int kBeforeBytes = kDecayBefore + (kConstantDecay ? 0 : kRowsBefore * kDecayPitch);
  static constexpr int kExchangeBytes = kStateBytes + kGradientBytes + kKeyBytes;
  static constexpr int kScratchBytes = kBeforeBytes > kExchangeBytes ? kBeforeBytes : kExchangeBytes;

  static constexpr int kR = 0;
  static constexpr int kDy = kR + kRowsBytes;
  static constexpr int kK = kDy + kRowsBytes;
  static constexpr int kV = kK + kRowsBytes;
  static constexpr int kW = kV + kRowsBytes;
  static constexpr int kPairs = kW + kDecayRowsBytes;
  static constexpr int kZeros = kPairs + kChunks * kPairBytes;
  static constexpr int kNear = kZeros + kZeroBytes;
  static constexpr int kPlaces = kNear + kChunks * kNearBytes;
  static constexpr int kPlacesBytes = 10 * 8;
  static constexpr int kLanes = kPlaces + kPlacesBytes;
  static constexpr int kScratch = kLanes + kThreads * 32;
  static constexpr int kSharedBytes = kScratch + kScratchBytes;
};

// What follows from a block's segment; kept in shared memory, because registers are scarce.
template <class T, class W>
struct BackwardPlaces {
  const T *r, *k, *v, *dy;  // the segment's first token
  const W* w;
  const float* states;  // the first one kept
  const float* scores;  // of the segment's first token
  float* dstate;        // nullptr: not wanted
  int64_t sums;         // of the block's channels in du_partial and dw_partial
  int64_t tokens;
};

// Rows of what moves the state, from some token on.
template <class Layout>
struct StateRows {
  char *k, *v, *w;

  __device__ __forceinline__ StateRows from(int token) const {
    return {k + token * Layout::kPitch, v + token * Layout::kPitch, w + token * Layout::kDecayPitch};
  }
};

template <class Layout>
struct BackwardShared {
  char *r, *dy, *k, *v, *w;          // rows of the stage; dr, dk and dw take the place of r, k and w
  StateRows<Layout> before;          // rows of the tokens before it, until the exchange takes their place
  char *pairs, *zeros, *near;
  BackwardPlaces<typename Layout::Activation, typename Layout::Decay>* places;
  char* lanes;                       // LaneOffsets of every thread
  char *state, *gradient, *keys;     // exchange

  __device__ __forceinline__ BackwardShared() {
    r = shared_array<char>(Layout::kR, Layout::kRowsBytes);
    dy = shared_array<char>(Layout::kDy, Layout::kRowsBytes);
    k = shared_array<char>(Layout::kK, Layout::kRowsBytes);
    v = shared_array<char>(Layout::kV, Layout::kRowsBytes);
    w = nullptr;
    if constexpr (!Layout::kConstantDecay) w = shared_array<char>(Layout::kW, Layout::kDecayRowsBytes);
    pairs = shared_array<char>(Layout::kPairs, Layout::kChunks * Layout::kPairBytes);
    zeros = shared_array<char>(Layout::kZeros, Layout::kZeroBytes);
    near = shared_array<char>(Layout::kNear, Layout::kChunks * Layout::kNearBytes);
    places = shared_array<std::remove_pointer_t<decltype(places)>>(Layout::kPlaces, 1);
    static_assert(sizeof(*places) == Layout::kPlacesBytes);
    lanes = shared_array<char>(Layout::kLanes, Layout::kThreads * 32);
    char* const scratch = shared_array<char>(Layout::kScratch, Layout::kScratchBytes);
    state = scratch;
    gradient = state + Layout::kStateBytes;
    keys = gradient + Layout::kGradientBytes;
    before = {scratch + Layout::kKeyBefore, scratch + Layout::kValueBefore, scratch + Layout::kDecayBefore};
  }
  __device__ __forceinline__ StateRows<Layout> state_rows() const { return {k, v, w}; }
};

// The token that a fragment's row or column of that number stands for; a chunk's rows in shared memory likewise.
__device__ __forceinline__ constexpr int token_of_row(int row) { return row % 8 / 2 * 4 + row / 8 * 2 + row % 2; }
// The inverse, for any token of a stage: chunk after chunk.
__device__ __forceinline__ constexpr int row_of_token(int token) {
  return token / 16 * 16 + token % 4 / 2 * 8 + token % 16 / 4 * 2 + token % 2;
}

// The rows that a lane names to load_matrices, as byte offsets into a chunk's rows.
// Transposed, d[h + 2c]: tokens of half h, columns 8c to 8c + 7 from the given column on; two second operands.
// As stored, d[h + 2c]: the same tokens and columns; a first operand.
template <int kPitch>
__device__ __forceinline__ int square_row() {
  const int lane = lane_index();
  return lane % 16 * kPitch + lane / 16 * 16;
}
// As stored, d[c + 2h]: the same; two second operands.
template <int kPitch>
__device__ __forceinline__ int turned_square_row() {
  const int lane = lane_index();
  return (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16;
}
// As stored, d[m]: the eight tokens of half 0 (half 1 is eight rows on), columns 8m to 8m + 7.
template <int kPitch>
__device__ __forceinline__ int wide_row() {
  const int lane = lane_index();
  return lane % 8 * kPitch + lane / 8 * 16;
}

// Visits pairs of neighbouring tokens of one channel: visit(c, h, index of the pair in load_matrices_transposed's d).
template <class Visit>
__device__ __forceinline__ void for_each_pair(const Visit& visit) {
  static_for<0, 2>([&](auto half) {
    static_for<0, 2>([&](auto channel) { visit(channel.value, half.value, half.value + 2 * channel.value); });
  });
}

// This lane's values of a 16-bit tensor; row: square_row at the warp's channels.
template <class T>
__device__ __forceinline__ void load_chunk(ChunkValues& x, const char* row) {
  uint32_t pairs[4];
  load_matrices_transposed(pairs, row);
  for_each_pair([&](int c, int half, int index) {
    const float2 two = unpack<T>(pairs[index]);
    x[c][2 * half] = two.x, x[c][2 * half + 1] = two.y;
  });
}

// The inverse: rounds, and puts every lane's values where load_chunk found them.
template <class T>
__device__ __forceinline__ void store_chunk(char* row, const ChunkValues& x) {
  uint32_t pairs[4];
  for_each_pair([&](int c, int half, int index) { pairs[index] = pack<T>(x[c][2 * half], x[c][2 * half + 1]); });
  store_matrices_transposed(row, pairs);
}

}  // namespace rwkv
