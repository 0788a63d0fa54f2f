// What one chunk of 16 tokens contributes to dr, dk and the decay's gradient, channel by channel.
//
// With S the state before the chunk, G = dL/dS after it, B_ij = dy_i . v_j, and P, Q, W, D the products of decays of
// wkv_tree.cuh (before a token, after it, all 16, strictly between j and i):
//   dr_i = P_i (S dy_i) + sum_{j<i} B_ij D_ij k_j + B_ii u k_i
//   dk_j = Q_j (G v_j)  + sum_{i>j} B_ij D_ij r_i + B_jj u r_j
//   dlogw_t = W rowsum(S G) + sum_{i>t} r_i P_i (S dy_i) + sum_{j<t} k_j Q_j (G v_j) + sum_{j<t<i} r_i k_j D_ij B_ij
// Every term of dlogw_t has w_t as a factor and terms are only added: nothing cancels, whatever the decays.
//
// The tree of wkv_tree.cuh splits the pairs j < i by the node whose left half has j and whose right half has i, and
// D_ij = q_j p_i there. P, Q and the levels' p, q are nested products, so dr is built from the outside to the inside:
//   dr = p_quad (level 2 + sibling (level 3 + octet (S dy))),    level l = sum_j B_ij q_j k_j
// where sibling and octet are the decays of the quad and of the octet before the token's own, if that is in the same
// node, else 1. dk likewise. The partial values on the way are what dlogw needs: pairs of an outer level reach tokens t
// in other quads, pairs of an inner one only tokens between the two.
#pragma once

#include "cuda/wkv_backward_layout.cuh"

namespace rwkv {

// ---- decays of a chunk ----

struct ChunkDecay {
  ChunkValues exponent;  // exp(x) log2(e) (Finch)
  ChunkValues w;
  float front[2], back[2];  // products over the first and the last two tokens of the quad
  float sibling[2];         // over the other quad of the octet
  float octet[2];           // over the other octet
  float whole[2];           // over the chunk

  __device__ __forceinline__ void multiply_up() {
    static_for<0, 2>([&](auto c) {
      front[c.value] = w[c.value][0] * w[c.value][1];
      back[c.value] = w[c.value][2] * w[c.value][3];
      const float quad = front[c.value] * back[c.value];
      sibling[c.value] = shuffle_xor(quad, 1);
      const float own_octet = quad * sibling[c.value];
      octet[c.value] = shuffle_xor(own_octet, 2);
      whole[c.value] = own_octet * octet[c.value];
    });
  }
};

// rows: the chunk's first row of w (Finch); constant_exponent: of the warp's channels (Eagle). Tokens from
// tokens_left on do not exist and decay nothing; copy_stage sees to that where w has rows.
template <class Layout>
__device__ __forceinline__ void load_decay(ChunkDecay& decay, const char* rows, const float (&constant_exponent)[2],
                                           int tokens_left) {
  using W = typename Layout::Decay;
  const int channel = 16 * warp_index(), group = lane_index() / 4, token = lane_index() % 4 * 4;
  if constexpr (Layout::kConstantDecay) {
    const float w[2] = {exp2_fast(-constant_exponent[0]), exp2_fast(-constant_exponent[1])};
    static_for<0, 8>([&](auto i) {
      decay.w[i.value / 4][i.value % 4] = token + i.value % 4 < tokens_left ? w[i.value / 4] : 1.f;
    });
  } else {
    ChunkValues x;
    if constexpr (sizeof(W) == 2) {
      load_chunk<W>(x, rows + square_row<Layout::kDecayPitch>() + 2 * channel);
    } else {
      const char* const own = rows + row_of_token(token) * Layout::kDecayPitch + 4 * (channel + group);
      static_for<0, 8>([&](auto i) {
        x[i.value / 4][i.value % 4] =
            load_shared<float>(own + row_of_token(i.value % 4) * Layout::kDecayPitch + i.value / 4 * 32);
      });
    }
    static_for<0, 8>([&](auto i) {
      const float exponent = decay_exponent(x[i.value / 4][i.value % 4]);
      decay.exponent[i.value / 4][i.value % 4] = exponent;
      decay.w[i.value / 4][i.value % 4] = exp2_fast(-exponent);
    });
  }
  decay.multiply_up();
}

// r or k times the decays to the border of the lane's quad, and the first operand of level 1, which meets only the
// decay inside its pair of tokens.
struct QuadOperand {
  ChunkValues quad;
  float pair[2][2];
};

__device__ __forceinline__ void scale_r(QuadOperand& scaled, const ChunkValues& r, const ChunkDecay& decay) {
  static_for<0, 2>([&](auto c) {
    scaled.pair[c.value][0] = r[c.value][2];
    scaled.pair[c.value][1] = r[c.value][3] * decay.w[c.value][2];
    scaled.quad[c.value][0] = r[c.value][0];
    scaled.quad[c.value][1] = r[c.value][1] * decay.w[c.value][0];
    scaled.quad[c.value][2] = scaled.pair[c.value][0] * decay.front[c.value];
    scaled.quad[c.value][3] = scaled.pair[c.value][1] * decay.front[c.value];
  });
}

__device__ __forceinline__ void scale_k(QuadOperand& scaled, const ChunkValues& k, const ChunkDecay& decay) {
  static_for<0, 2>([&](auto c) {
    scaled.pair[c.value][0] = k[c.value][0] * decay.w[c.value][1];
    scaled.pair[c.value][1] = k[c.value][1];
    scaled.quad[c.value][0] = scaled.pair[c.value][0] * decay.back[c.value];
    scaled.quad[c.value][1] = scaled.pair[c.value][1] * decay.back[c.value];
    scaled.quad[c.value][2] = k[c.value][2] * decay.w[c.value][3];
    scaled.quad[c.value][3] = k[c.value][3];
  });
}

__device__ __forceinline__ void scale(ChunkValues& x, const ChunkValues& y, const float (&by)[2]) {
  static_for<0, 8>([&](auto i) {
    x[i.value / 4][i.value % 4] = y[i.value / 4][i.value % 4] * by[i.value / 4];
  });
}
__device__ __forceinline__ void scale(ChunkValues& x, const ChunkValues& y, const float (&a)[2], const float (&b)[2]) {
  const float both[2] = {a[0] * b[0], a[1] * b[1]};
  scale(x, y, both);
}

// Where the lane's quad is in its octet and in the chunk, and the factors that follow from it.
struct QuadPlace {
  bool second_quad = lane_index() & 1;   // of its octet
  bool second_octet = lane_index() & 2;
};

struct LevelFactors {
  float sibling_before[2], sibling_after[2];  // the octet's other quad, if it is before (after) this one, else 1
  float octet_before[2], octet_after[2];

  __device__ __forceinline__ LevelFactors(const ChunkDecay& decay, const QuadPlace& place) {
    static_for<0, 2>([&](auto c) {
      sibling_before[c.value] = place.second_quad ? decay.sibling[c.value] : 1.f;
      sibling_after[c.value] = place.second_quad ? 1.f : decay.sibling[c.value];
      octet_before[c.value] = place.second_octet ? decay.octet[c.value] : 1.f;
      octet_after[c.value] = place.second_octet ? 1.f : decay.octet[c.value];
    });
  }
};

// ---- scores of pairs of tokens ----

// A lane of a fragment of B stands for one quad of first tokens (t) and one of second tokens (g / 2), so for pairs of a
// single level and order.
enum PairKind { kLevel1, kLevel2Before, kLevel2After, kLevel3Before, kLevel3After };  // where the first token is

struct PairPlace {
  int bits;  // below 16: the lane's offset in a fragment; above: a bit for each kind, one of them set

  static __device__ __forceinline__ int of_lane() {
    const int first = lane_index() % 4, second = lane_index() / 8, apart = first ^ second;
    const int before = apart > 1 ? kLevel3Before : kLevel2Before;
    const int kind = apart == 0 ? kLevel1 : before + (first > second);
    return lane_index() * 16 | 0x10000 << kind;
  }
  __device__ __forceinline__ int offset() const { return bits & 0xffff; }
  __device__ __forceinline__ bool is(PairKind kind) const { return bits & 0x10000 << kind; }
  __device__ __forceinline__ bool first_is_before() const {
    return bits & (0x10000 << kLevel2Before | 0x10000 << kLevel3Before);
  }
};

// Where a lane finds the pairs of one kind: zeros, if they are not its own.
template <class Layout>
struct PairAddresses {
  const char *own, *zeros;
  PairPlace place;

  __device__ __forceinline__ PairAddresses(const BackwardShared<Layout>& shared, int chunk, PairPlace place)
      : own(shared.pairs + chunk * Layout::kPairBytes + place.offset()), zeros(shared.zeros), place(place) {}
  __device__ __forceinline__ const char* of(PairKind kind) const { return place.is(kind) ? own : zeros; }
};

// sum[h][2c + e] += sum over the tokens of the level x[channel c][.] B[.][token 2h + e]
template <class T>
__device__ __forceinline__ void add_level(float (&sum)[2][4], const ChunkValues& x, const char* scores) {
  static_for<0, 2>([&](auto half) {
    const float4 b = load_shared<float4>(scores + half.value * 512);
    const float a[4] = {tf32_operand<T>(x[0][2 * half.value]), tf32_operand<T>(x[1][2 * half.value]),
                        tf32_operand<T>(x[0][2 * half.value + 1]), tf32_operand<T>(x[1][2 * half.value + 1])};
    mma_tf32(sum[0], a, b.x, b.y);
    mma_tf32(sum[1], a, b.z, b.w);
  });
}

// B of one chunk, symmetric, in the order that add_level reads: [half of the first token][lane]{second token in half 0,
// in half 1}. Also, exactly, what lies within two tokens: [quad]{B_10, B_11, B_32, B_33, B_00, B_22}.
template <class T, class Layout>
__device__ __forceinline__ void store_pair_scores(const BackwardShared<Layout>& shared, int chunk,
                                                  PairPlace place) {
  const char* const dy = shared.dy + chunk * kTreeTokens * Layout::kPitch;
  const char* const v = shared.v + chunk * kTreeTokens * Layout::kPitch;
  float of_dy[2][4] = {}, of_v[2][4] = {};  // dy v^T and v dy^T; [h][2i + e]: row in half i, column 2h + e of the quad
  static_for<0, Layout::kSize / 16>([&](auto s) {
    uint32_t dy_first[4], dy_second[4], v_first[4], v_second[4];
    load_matrices(dy_first, dy + square_row<Layout::kPitch>() + 32 * s.value);
    load_matrices(v_second, v + turned_square_row<Layout::kPitch>() + 32 * s.value);
    load_matrices(v_first, v + square_row<Layout::kPitch>() + 32 * s.value);
    load_matrices(dy_second, dy + turned_square_row<Layout::kPitch>() + 32 * s.value);
    static_for<0, 2>([&](auto half) {
      constexpr int kAt = 2 * half.value;
      mma16<T>(of_dy[half.value], dy_first, v_second[kAt], v_second[kAt + 1]);
      mma16<T>(of_v[half.value], v_first, dy_second[kAt], dy_second[kAt + 1]);
    });
  });
  // B is dy of the later token times v of the earlier one. In a lane's own quad, half 0 is earlier than half 1; what
  // is within a half there, level 1 does not read.
  char* const to = shared.pairs + chunk * Layout::kPairBytes + place.offset();
  static_for<0, 2>([&](auto half) {
    float b[4];
    static_for<0, 4>([&](auto e) {
      const bool first_is_earlier = place.first_is_before() || (half.value < e.value / 2 && place.is(kLevel1));
      b[e.value] = round_tf32(first_is_earlier ? of_dy[half.value][e.value] : of_v[half.value][e.value]);
    });
    store_shared(to + half.value * 512, make_float4(b[0], b[1], b[2], b[3]));
  });
  char* const near = shared.near + chunk * Layout::kNearBytes + place.offset() / 16 % 4 * 32;
  const bool odd = place.offset() & 4 * 16;  // the second token
  if (place.is(kLevel1) && odd) store_shared(near, make_float4(of_dy[0][0], of_dy[0][1], of_dy[1][2], of_dy[1][3]));
  if (place.is(kLevel1) && !odd) store_shared(near + 16, make_float2(of_dy[0][0], of_dy[1][2]));
}

// ---- gradients of a chunk ----

struct ChunkGradients {
  ChunkValues dr, dk, dlogw;
};

// dr = S dy and dk = G v on entry, [half][2c + e]; inner: rowsum(S G).
template <class Layout>
__device__ __forceinline__ void chunk_gradients(ChunkGradients& gradients, float (&dr)[2][4], float (&dk)[2][4],
                                                const float (&inner)[2], const ChunkValues& r, const ChunkValues& k,
                                                const QuadOperand& r_scaled, const QuadOperand& k_scaled,
                                                const ChunkDecay& decay, const LevelFactors& factors,
                                                const QuadPlace& place, const PairAddresses<Layout>& pairs) {
  using T = typename Layout::Activation;
  const auto multiply = [](float (&x)[2][4], const float (&by)[2]) {
    static_for<0, 8>([&](auto i) { x[i.value / 4][i.value % 4] *= by[i.value % 4 / 2]; });
  };
  // Sums over the lane's quad of r dr and k dk at one point of the nest.
  const auto quad_sum = [](float (&sum)[2], const ChunkValues& x, const float (&y)[2][4]) {
    static_for<0, 2>([&](auto c) {
      sum[c.value] = x[c.value][0] * y[0][2 * c.value];
      static_for<1, 4>([&](auto i) {
        sum[c.value] = fmaf(x[c.value][i.value], y[i.value / 2][2 * c.value + i.value % 2], sum[c.value]);
      });
    });
  };
  float r_outside[2], k_outside[2], r_octet[2], k_octet[2];
  quad_sum(r_outside, r_scaled.quad, dr);
  quad_sum(k_outside, k_scaled.quad, dk);

  ChunkValues climbed;
  multiply(dr, factors.octet_before);
  multiply(dk, factors.octet_after);
  scale(climbed, k_scaled.quad, factors.sibling_after);
  add_level<T>(dr, climbed, pairs.of(kLevel3Before));
  scale(climbed, r_scaled.quad, factors.sibling_before);
  add_level<T>(dk, climbed, pairs.of(kLevel3After));
  quad_sum(r_octet, r_scaled.quad, dr);
  quad_sum(k_octet, k_scaled.quad, dk);
  multiply(dr, factors.sibling_before);
  multiply(dk, factors.sibling_after);
  add_level<T>(dr, k_scaled.quad, pairs.of(kLevel2Before));
  add_level<T>(dk, r_scaled.quad, pairs.of(kLevel2After));

  // What the tokens of other quads and the world outside the chunk add to dlogw of all four tokens here.
  float common[2];
  static_for<0, 2>([&](auto c) {
    const float sibling = decay.sibling[c.value], octet = decay.octet[c.value];
    const float to_sibling = sibling * (place.second_quad ? r_octet[c.value] : k_octet[c.value]);
    const float climb = place.second_octet == place.second_quad ? sibling : 1.f;
    float to_octet = octet * climb * (place.second_octet ? r_outside[c.value] : k_outside[c.value]);
    to_octet += shuffle_xor(to_octet, 1);
    common[c.value] = fmaf(decay.whole[c.value], inner[c.value], shuffle_xor(to_octet, 2) + shuffle_xor(to_sibling, 1));
  });

  float r_pair[4], k_pair[4];  // level 1's first operands
  float from_right[2], from_left[2];
  static_for<0, 2>([&](auto c) {
    constexpr int kC = 2 * c.value;
    const float front = decay.front[c.value], back = decay.back[c.value];
    const auto& w = decay.w[c.value];
    const auto& rp = r_scaled.pair[c.value];
    const auto& kp = k_scaled.pair[c.value];
    dr[0][kC + 1] *= w[0], dr[1][kC] *= front, dr[1][kC + 1] *= front;
    dk[1][kC] *= w[3], dk[0][kC] *= back, dk[0][kC + 1] *= back;
    // r dr of later tokens, then k dk of earlier ones, in the quad but not within the pair
    from_right[c.value] = fmaf(rp[0], dr[1][kC], fmaf(rp[1], dr[1][kC + 1], common[c.value]));
    from_left[c.value] = fmaf(kp[1], dk[0][kC + 1], fmaf(kp[0], dk[0][kC], common[c.value]));
    gradients.dlogw[c.value][0] = fmaf(r[c.value][1], dr[0][kC + 1], from_right[c.value]);
    gradients.dlogw[c.value][3] = fmaf(k[c.value][2], dk[1][kC], from_left[c.value]);
    r_pair[c.value] = tf32_operand<T>(rp[0]), r_pair[c.value + 2] = tf32_operand<T>(rp[1]);
    k_pair[c.value] = tf32_operand<T>(kp[0]), k_pair[c.value + 2] = tf32_operand<T>(kp[1]);
  });
  const float2 to_second = load_shared<float2>(pairs.of(kLevel1) + 8);
  const float2 to_first = load_shared<float2>(pairs.of(kLevel1) + 512);
  mma_tf32(dr[1], k_pair, to_second.x, to_second.y);
  mma_tf32(dk[0], r_pair, to_first.x, to_first.y);
  static_for<0, 2>([&](auto c) {
    constexpr int kC = 2 * c.value;
    dr[1][kC + 1] *= decay.w[c.value][2];
    dk[0][kC] *= decay.w[c.value][1];
    gradients.dlogw[c.value][1] = fmaf(k[c.value][0], dk[0][kC], from_right[c.value]);
    gradients.dlogw[c.value][2] = fmaf(r[c.value][3], dr[1][kC + 1], from_left[c.value]);
    static_for<0, 4>([&](auto i) {
      gradients.dr[c.value][i.value] = dr[i.value / 2][kC + i.value % 2];
      gradients.dk[c.value][i.value] = dk[i.value / 2][kC + i.value % 2];
    });
  });
}

// Level 0, whose pairs have no decay between them, and the bonus u of each token with itself; du: sum of B_tt r_t k_t.
template <class Layout>
__device__ __forceinline__ void add_near_pairs(ChunkGradients& gradients, float (&du)[2], const ChunkValues& r,
                                               const ChunkValues& k, const float (&u)[2],
                                               const BackwardShared<Layout>& shared, int chunk) {
  const char* const near = shared.near + chunk * Layout::kNearBytes + lane_index() % 4 * 32;
  const float4 odd = load_shared<float4>(near);
  const float2 even = load_shared<float2>(near + 16);
  const float beside[2] = {odd.x, odd.z}, diagonal[4] = {even.x, odd.y, even.y, odd.w};
  static_for<0, 2>([&](auto c) {
    auto& dr = gradients.dr[c.value];
    auto& dk = gradients.dk[c.value];
    static_for<0, 2>([&](auto half) {
      constexpr int kFirst = 2 * half.value;
      dr[kFirst + 1] = fmaf(beside[half.value], k[c.value][kFirst], dr[kFirst + 1]);
      dk[kFirst] = fmaf(beside[half.value], r[c.value][kFirst + 1], dk[kFirst]);
    });
    static_for<0, 4>([&](auto i) {
      const float k_scored = diagonal[i.value] * k[c.value][i.value];
      du[c.value] = fmaf(k_scored, r[c.value][i.value], du[c.value]);
      dr[i.value] = fmaf(k_scored, u[c.value], dr[i.value]);
      dk[i.value] = fmaf(diagonal[i.value] * u[c.value], r[c.value][i.value], dk[i.value]);
    });
  });
}

}  // namespace rwkv
