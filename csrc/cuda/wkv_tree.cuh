// A chunk of 16 tokens seen from inside and outside, for one unit of 64 channels (32 when the head has no more):
//   r~_i = r_i P_i       P_i = product of the decays before i        (what the state before the chunk meets)
//   k~_j = k_j Q_j       Q_j = product of the decays after j         (what the state after the chunk receives)
//   W    = product of all 16 decays
//   A_ij = sum_c r_ic k_jc D_ij,c, D_ij = product of the decays between j and i (j < i);  A_ii = sum_c r_ic u_c k_ic
// All products are of numbers in [0, 1]: nothing is divided, no logarithm is subtracted, a decay of 0 is exact.
//
// A comes from a binary tree over the tokens. For j < i let l be the highest bit in which they differ: at level l, i is
// in the right and j in the left half of one node, and D_ij = q_j p_i, where q_j reaches from j to the node's middle
// and p_i from the middle to i. With X_i = r_i p_i for tokens in a right half and X_j = k_j q_j in a left one,
// A_ij = sum_c X_ic X_jc: level l of A is the Gram matrix of one operand X of 16 rows.
//
// A lane has two neighbouring channels and all 16 tokens, so the products need no exchange. Tokens come in quads
// 0..3; a value climbs the levels by one multiplication each: r p (quad) -> level 2 -> level 3 -> r~.
#pragma once

#include "cuda/decay.cuh"
#include "cuda/static_for.h"

namespace rwkv {

// Shared memory of a unit and how it is addressed. T: activation type. Pitches are odd multiples of 16 bytes, so that
// neither the rows of load_matrices nor the lanes of a vector access meet in a bank.
template <class T, int kSize>
struct TreeLayout {
  static constexpr int kChannels = kSize < 64 ? kSize : 64;  // of a unit
  static constexpr int kOperandPitch = 2 * kChannels + 16;   // bytes
  static constexpr int kOperandBytes = kTreeTokens * kOperandPitch;  // of a level

  // r~ of a chunk as A fragments: [key tile of 8][lane]{(i, c), (i + 8, c), (i, c + 1), (i + 8, c + 1)}. In odd tiles
  // neighbouring rows change places (64 bytes apart), so that the lanes that write two tiles at once use all banks.
  static constexpr int kReadTilePitch = 32 * 16;
  static constexpr int kReadSwap = 64;
  static constexpr int kReadBytes = kSize / 8 * kReadTilePitch;

  // k~ of a chunk as B fragments: [c odd][c / 2][t]{tokens 2t, 2t + 1, 2t + 8, 2t + 9}.
  static constexpr int kWritePitch = 4 * 16 + 16;
  static constexpr int kWritePlane = kSize / 2 * kWritePitch + 64;
  static constexpr int kWriteBytes = 2 * kWritePlane;

  static constexpr int kScorePitch = 24;  // floats of a row of A; banks apart for 8-byte accesses
};

// Where a unit finds its tokens and puts its results.
template <class T>
struct TreeUnit {
  const T* r;  // [16] rows of row_bytes, at the unit's first channel
  const T* k;
  int row_bytes;
  char* operands[4];   // X of levels 1 to 3; level 0 has all factors 1: it reads r and k themselves
  char* read;          // r~, at the unit's first key tile
  char* write;         // k~, at the unit's first channel
  float* chunk_decay;  // W, at the unit's first channel
  float* scores;       // this unit's share of A
};

__device__ __forceinline__ const char* row_of(const void* base, int row, int pitch) {
  return static_cast<const char*>(base) + row * pitch;
}

// Sums 16 values over the 32 lanes: lane (g, t) gets the total of value g + 8 (t % 2). Halves what a lane holds at each
// exchange; the caller has done the first one, which leaves value i + 8 (lane % 2) in partial[i].
__device__ __forceinline__ float sum_over_lanes(float (&partial)[8]) {
  const int lane = lane_index();
  static_for<0, 3>([&](auto step) {
    constexpr int kKept = 4 >> step.value;
    const bool upper = lane & (16 >> step.value);
    static_for<0, kKept>([&](auto i) {
      const float mine = upper ? partial[i.value + kKept] : partial[i.value];
      const float other = upper ? partial[i.value] : partial[i.value + kKept];
      partial[i.value] = mine + shuffle_xor(other, 16 >> step.value);
    });
  });
  return partial[0] + shuffle_xor(partial[0], 2);
}

// r~, k~, W and X of the unit, and each lane's share of the diagonal of A: value g + 8 (t % 2), see above. w are the
// lane's 16 decays, u its bonus. In a head of 32 channels the upper half of the warp has u = 0 and stores nothing.
template <class T, int kSize>
__device__ __forceinline__ float chunk_factors(const TreeUnit<T>& unit, const float2 (&w)[kTreeTokens], float2 u) {
  using Layout = TreeLayout<T, kSize>;
  const int lane = lane_index(), pair = lane % (Layout::kChannels / 2);
  const bool stores = Layout::kChannels == 64 || lane < Layout::kChannels / 2;
  const int swap = pair / 4 % 2 * Layout::kReadSwap;
  char* const read = unit.read + pair / 4 * Layout::kReadTilePitch + pair % 4 * 16;
  char* const write = unit.write + pair * Layout::kWritePitch;
  const auto put = [&](auto level, auto token, float2 x) {  // into X of this level
    if (stores)
      store_shared(unit.operands[level.value] + token.value * Layout::kOperandPitch + 4 * pair, pack<T>(x.x, x.y));
  };

  float2 front[4], back[4], whole[4];  // per quad: products of tokens 0 1, of 2 3, of all four
  static_for<0, 4>([&](auto q) {
    front[q.value] = times(w[4 * q.value], w[4 * q.value + 1]);
    back[q.value] = times(w[4 * q.value + 2], w[4 * q.value + 3]);
    whole[q.value] = times(front[q.value], back[q.value]);
  });
  const float2 first_octet = times(whole[0], whole[1]), second_octet = times(whole[2], whole[3]);

  float diagonal[8];
  // Quads q and q + 2 together: the fragments of r~ and k~ pair token i with token i + 8.
  static_for<0, 2>([&](auto half) {
    float2 reads[2][4], writes[2][4];
    float bonus[2][4];
    static_for<0, 2>([&](auto octet) {
      constexpr int kQuad = 2 * octet.value + half.value;
      static_for<0, 4>([&](auto place) {
        constexpr int kPlace = place.value, kToken = 4 * kQuad + kPlace;
        const std::integral_constant<int, kToken> token;
        const std::integral_constant<int, 1> level1;
        const std::integral_constant<int, 2> level2;
        const std::integral_constant<int, 3> level3;
        const float2 r = load_pair(reinterpret_cast<const T*>(row_of(unit.r + 2 * pair, kToken, unit.row_bytes)));
        const float2 k = load_pair(reinterpret_cast<const T*>(row_of(unit.k + 2 * pair, kToken, unit.row_bytes)));
        bonus[octet.value][kPlace] = fmaf(r.y * u.y, k.y, r.x * u.x * k.x);

        // Level 1 has pairs: the tokens beside its middle keep factor 1, so X there is r or k itself.
        float2 x = r;  // r times the decays from the quad's start
        if constexpr (kPlace == 3) put(level1, token, x = times(x, w[4 * kQuad + 2]));
        if constexpr (kPlace == 1) x = times(x, w[4 * kQuad]);
        if constexpr (kPlace >= 2) x = times(x, front[kQuad]);
        if constexpr (kQuad % 2 == 1 && kPlace > 0) put(level2, token, x);
        if constexpr (kQuad == 3) x = times(x, whole[2]);
        if constexpr (kQuad >= 2 && kToken > 8) put(level3, token, x);
        if constexpr (kQuad == 1) x = times(x, whole[0]);
        if constexpr (kQuad >= 2) x = times(x, first_octet);
        reads[octet.value][kPlace] = x;

        x = k;  // k times the decays to the quad's end
        if constexpr (kPlace == 0) put(level1, token, x = times(x, w[4 * kQuad + 1]));
        if constexpr (kPlace == 2) x = times(x, w[4 * kQuad + 3]);
        if constexpr (kPlace <= 1) x = times(x, back[kQuad]);
        if constexpr (kQuad % 2 == 0 && kPlace < 3) put(level2, token, x);
        if constexpr (kQuad == 0) x = times(x, whole[1]);
        if constexpr (kQuad <= 1 && kToken < 7) put(level3, token, x);
        if constexpr (kQuad == 2) x = times(x, whole[3]);
        if constexpr (kQuad <= 1) x = times(x, second_octet);
        writes[octet.value][kPlace] = x;
      });
    });
    static_for<0, 4>([&](auto place) {
      constexpr int kPlace = place.value;
      const float mine = lane & 1 ? bonus[1][kPlace] : bonus[0][kPlace];
      const float other = lane & 1 ? bonus[0][kPlace] : bonus[1][kPlace];
      diagonal[4 * half.value + kPlace] = mine + shuffle_xor(other, 1);
      const float2 low = reads[0][kPlace], high = reads[1][kPlace];
      if (stores)
        store_shared(read + (4 * half.value + kPlace) * 64 + (kPlace % 2 ? -swap : swap),
                     make_float4(round_tf32(low.x), round_tf32(high.x), round_tf32(low.y), round_tf32(high.y)));
    });
    static_for<0, 2>([&](auto two) {
      constexpr int kPlace = 2 * two.value;
      const float2 a = writes[0][kPlace], b = writes[0][kPlace + 1], c = writes[1][kPlace], d = writes[1][kPlace + 1];
      char* const to = write + (2 * half.value + two.value) * 16;
      if (stores) {
        store_shared(to, make_float4(round_tf32(a.x), round_tf32(b.x), round_tf32(c.x), round_tf32(d.x)));
        store_shared(to + Layout::kWritePlane,
                     make_float4(round_tf32(a.y), round_tf32(b.y), round_tf32(c.y), round_tf32(d.y)));
      }
    });
  });
  if (stores) store_shared(unit.chunk_decay + 2 * pair, times(first_octet, second_octet));
  return sum_over_lanes(diagonal);
}

// A of the unit's channels into unit.scores, rounded to tf32 where the unit has all channels. Needs every lane's
// chunk_factors (a warp barrier between) and the diagonal as that returned it.
template <class T, int kSize>
__device__ __forceinline__ void chunk_scores(const TreeUnit<T>& unit, float diagonal) {
  using Layout = TreeLayout<T, kSize>;
  const int lane = lane_index(), group = lane / 4, member = lane % 4, token = lane % 16;
  const int column = lane / 16 * 16;  // bytes: this lane addresses the left or right 8 columns of token's row
  // Octet by octet: A[g][2t + e] of both octets, and A[g + 8][2t + e] of the block below the first.
  float first[2] = {0.f, 0.f}, second[2] = {0.f, 0.f}, below[2] = {0.f, 0.f};
  static_for<0, 4>([&](auto level) {
    constexpr int kLevel = level.value, kHalf = 1 << kLevel;
    const int in_node = token % (2 * kHalf);
    const char* row;  // of X; beside the middle X is r or k itself
    if (in_node == kHalf)
      row = row_of(unit.r, token, unit.row_bytes);
    else if (in_node == kHalf - 1)
      row = row_of(unit.k, token, unit.row_bytes);
    else
      row = unit.operands[kLevel] + token * Layout::kOperandPitch;
    row += column;
    float left[4] = {}, right[4] = {};  // X times the first eight rows of X, and times the last eight
    static_for<0, Layout::kChannels / 16>([&](auto step) {
      uint32_t x[4];
      load_matrices(x, row + 32 * step.value);
      mma16<T>(left, x, x[0], x[2]);
      if constexpr (kLevel < 3) mma16<T>(right, x, x[1], x[3]);
    });
    static_for<0, 2>([&](auto e) {
      const int apart = group ^ (2 * member + e.value);
      if constexpr (kLevel < 3) {
        const bool here = apart >> kLevel == 1;  // this level is where the two tokens part
        first[e.value] = here ? left[e.value] : first[e.value];
        second[e.value] = here ? right[2 + e.value] : second[e.value];
      } else {
        below[e.value] = left[2 + e.value];
      }
    });
  });
  const float other = shuffle_xor(diagonal, 1);
  static_for<0, 2>([&](auto e) {
    const int j = 2 * member + e.value;
    const float own[2] = {member % 2 ? other : diagonal, member % 2 ? diagonal : other};
    first[e.value] = group > j ? first[e.value] : group == j ? own[0] : 0.f;
    second[e.value] = group > j ? second[e.value] : group == j ? own[1] : 0.f;
  });
  const auto rounded = [](float a, float b) {
    return kSize > Layout::kChannels ? make_float2(a, b) : make_float2(round_tf32(a), round_tf32(b));
  };
  float* const top = unit.scores + group * Layout::kScorePitch + 2 * member;
  float* const bottom = top + 8 * Layout::kScorePitch;
  store_shared(top, rounded(first[0], first[1]));
  store_shared(bottom, rounded(below[0], below[1]));
  store_shared(bottom + 8, rounded(second[0], second[1]));
}

}  // namespace rwkv
