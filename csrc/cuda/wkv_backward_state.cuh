// The two matrices that the backward kernel carries, 16 key channels by all values per warp, in accumulators:
//   S, the state before a chunk:          S <- diag(W) S + k~ v^T      (towards later chunks)
//   G, dL/dS after all tokens of a chunk: G <- diag(W) G + r~ dy^T     (towards earlier chunks)
// and what they are multiplied with: S dy^T (part of dr) and G v^T (part of dk).
// W, r~ and k~ are as in wkv_tree.cuh: products of decays over the chunk, before a token and after it.
#pragma once

#include "cuda/wkv_backward_layout.cuh"

namespace rwkv {

// tile[q][2c + e] is channel g + 8c, value 8q + 2t + e.
template <int kSize>
struct KeyRows {
  float tile[kSize / 8][4];

  // visit(two elements of a row, offset of the first in [key][value])
  template <class Visit>
  __device__ __forceinline__ void for_each_pair(const Visit& visit) {
    const int origin = (16 * warp_index() + lane_index() / 4) * kSize + 2 * (lane_index() % 4);
    static_for<0, kSize / 8>([&](auto q) {
      static_for<0, 2>([&](auto c) {
        visit(tile[q.value][2 * c.value], tile[q.value][2 * c.value + 1], origin + 8 * c.value * kSize + 8 * q.value);
      });
    });
  }
  __device__ __forceinline__ void clear() {
    for_each_pair([](float& a, float& b, int) { a = b = 0.f; });
  }
  __device__ __forceinline__ void load(const float* from) {
    for_each_pair([&](float& a, float& b, int at) {
      const float2 two = load_global<float2>(from + at);
      a = two.x, b = two.y;
    });
  }
  __device__ __forceinline__ void store(float* to) {
    for_each_pair([&](float& a, float& b, int at) { store_global(to + at, make_float2(a, b)); });
  }

  // To and from shared memory, where only the same lane reads it.
  __device__ __forceinline__ void put(char* to) const {
    static_for<0, kSize / 8>([&](auto q) {
      const auto& x = tile[q.value];
      store_shared(to + (q.value * 2 * kSize + thread_index()) * 16, make_float4(x[0], x[1], x[2], x[3]));
    });
  }
  __device__ __forceinline__ void get(const char* from) {
    static_for<0, kSize / 8>([&](auto q) {
      const float4 x = load_shared<float4>(from + (q.value * 2 * kSize + thread_index()) * 16);
      tile[q.value][0] = x.x, tile[q.value][1] = x.y, tile[q.value][2] = x.z, tile[q.value][3] = x.w;
    });
  }
};

// r~ or k~ as first operand of a product over the 16 tokens of a chunk. The second operand is exact in T; this one is
// the sum of two numbers of T, the second of which rounds what the first leaves: about 16 bits of mantissa, and the
// second operand needs no unpacking.
template <class T>
struct TokenOperand {
  uint32_t high[4], low[4];

  __device__ __forceinline__ explicit TokenOperand(const ChunkValues& x) {
    for_each_pair([&](int c, int half, int) {
      const float a = x[c][2 * half], b = x[c][2 * half + 1];
      high[c + 2 * half] = pack<T>(a, b);
      const float2 kept = unpack<T>(high[c + 2 * half]);
      low[c + 2 * half] = pack<T>(a - kept.x, b - kept.y);
    });
  }
  __device__ __forceinline__ void multiply(float (&sum)[4], uint32_t half0, uint32_t half1) const {
    mma16<T>(sum, high, half0, half1);
    mma16<T>(sum, low, half0, half1);
  }
};

// Products with strong decays leave the range of fp16, so there the operand is tf32.
template <>
struct TokenOperand<Float16> {
  float value[2][4];  // [half]{token 2t of channel g, of g + 8, token 2t + 1 of g, of g + 8}

  __device__ __forceinline__ explicit TokenOperand(const ChunkValues& x) {
    static_for<0, 2>([&](auto half) {
      static_for<0, 4>([&](auto i) {
        value[half.value][i.value] = round_tf32(x[i.value % 2][2 * half.value + i.value / 2]);
      });
    });
  }
  __device__ __forceinline__ void multiply(float (&sum)[4], uint32_t half0, uint32_t half1) const {
    const float2 first = unpack<Float16>(half0), second = unpack<Float16>(half1);
    mma_tf32(sum, value[0], first.x, first.y);
    mma_tf32(sum, value[1], second.x, second.y);
  }
};

// next = diag(decay) x + sum of operand rows, with rows of v or dy of one or two chunks; row: square_row of a chunk at
// value 0. next may be x.
template <class T, int kSize>
__device__ __forceinline__ void advance(KeyRows<kSize>& next, const KeyRows<kSize>& x, const float (&decay)[2],
                                        const TokenOperand<T>& operand, const char* row) {
  static_for<0, kSize / 16>([&](auto j) {
    uint32_t rows[4];
    load_matrices_transposed(rows, row + 32 * j.value);
    static_for<0, 2>([&](auto d) {
      constexpr int kTile = 2 * j.value + d.value;
      auto& tile = next.tile[kTile];
      static_for<0, 4>([&](auto e) { tile[e.value] = x.tile[kTile][e.value] * decay[e.value / 2]; });
      operand.multiply(tile, rows[2 * d.value], rows[2 * d.value + 1]);
    });
  });
}
template <class T, int kSize>
__device__ __forceinline__ void advance(KeyRows<kSize>& next, const KeyRows<kSize>& x, const float (&decay)[2],
                                        const TokenOperand<T>& first, const TokenOperand<T>& second,
                                        const char* first_row, const char* second_row) {
  advance(next, x, decay, first, first_row);
  static_for<0, kSize / 16>([&](auto j) {
    uint32_t rows[4];
    load_matrices_transposed(rows, second_row + 32 * j.value);
    static_for<0, 2>([&](auto d) {
      second.multiply(next.tile[2 * j.value + d.value], rows[2 * d.value], rows[2 * d.value + 1]);
    });
  });
}

// tf32 for the numbers of a tile, which as a first operand are needed in another order, hence copied. Cutting off is on
// average a loss of 0.72 x 2^-11; what is added before makes up for it, leaves tf32 numbers what they are, and NaN NaN.
template <class T>
__device__ __forceinline__ float copied_operand(float x) {
  return std::is_same_v<T, Float16> ? round_tf32(x) : x * (1.f + 0.72f / 2048.f);
}

// Tile q as a first operand with values along its columns: {value 2t of channel g, of g + 8, value 2t + 1 of g, of
// g + 8}.
template <class T, int kSize, class Visit>
__device__ __forceinline__ void for_each_operand(const KeyRows<kSize>& x, const Visit& visit) {
  static_for<0, kSize / 8>([&](auto q) {
    const auto& tile = x.tile[q.value];
    const float a[4] = {copied_operand<T>(tile[0]), copied_operand<T>(tile[2]), copied_operand<T>(tile[1]),
                        copied_operand<T>(tile[3])};
    visit(q.value, a);
  });
}

// product[h][2c + e] = sum over values of x[channel c][.] rows[token 2h + e of the quad][.]; row: wide_row of the
// chunk. visit as in for_each_operand.
template <class T, int kPitch, int kSize, class Visit>
__device__ __forceinline__ void contract(float (&product)[2][4], const KeyRows<kSize>& x, const char* row,
                                         const Visit& visit) {
  uint32_t rows[2][4];
  for_each_operand<T>(x, [&](int q, const float (&a)[4]) {
    visit(q, a);
    static_for<0, 2>([&](auto half) {
      if (q % 4 == 0) load_matrices(rows[half.value], row + 8 * half.value * kPitch + 16 * q);
      const float2 b = unpack<T>(rows[half.value][q % 4]);
      if (q == 0)
        mma_tf32_from_zero(product[half.value], a, b.x, b.y);
      else
        mma_tf32(product[half.value], a, b.x, b.y);
    });
  });
}

// rowsum(x y) for the warp's 16 channels: the diagonals of two 8 x 8 blocks of x y^T.
struct RowProducts {
  float block[2][4];  // channels of x by channels g (then g + 8) of y

  // Tile q: x as a first operand, y as it stands, which is a second operand for each block.
  template <class T>
  __device__ __forceinline__ void add(int q, const float (&x)[4], const float (&y)[4]) {
    static_for<0, 2>([&](auto c) {
      const float b0 = tf32_operand<T>(y[2 * c.value]), b1 = tf32_operand<T>(y[2 * c.value + 1]);
      if (q == 0)
        mma_tf32_from_zero(block[c.value], x, b0, b1);
      else
        mma_tf32(block[c.value], x, b0, b1);
    });
  }
  // The sum of the lane's channel g + 8c.
  __device__ __forceinline__ float sum(int c) const {
    const int group = lane_index() / 4;
    return shuffle(group % 2 ? block[c][2 * c + 1] : block[c][2 * c], lane_index() / 4 * 4 + group / 2);
  }
};

}  // namespace rwkv
