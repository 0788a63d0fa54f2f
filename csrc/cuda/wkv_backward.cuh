// WKV-5 and WKV-6 backward on tensor cores, one launch: from dy and the gradient of the last state to the gradients
// of r, k, v, w, u and the first state. Per head, S [key][value] the state, w = exp(-exp(x)), x the op's argument w:
//   S_t = diag(w_t) S_{t-1} + k_t v_t^T        y_t = r_t (S_{t-1} + diag(u) k_t v_t^T)
//   G_T = dstate_out;  G_{t-1} = diag(w_t) G_t + r_t dy_t^T            G_t = dL/dS_t
//   dv_j = G_C^T k~_j + sum_{i>=j} A_ij dy_i   in a chunk of 16 tokens that ends at C
//   dr, dk, dx: wkv_backward_tree.cuh
//
// A block of kSize / 16 warps has one head of one segment; each warp 16 key channels. It goes through the tokens from
// the last to the first in stages, and a stage in chunks:
//   stage: r, k, v, w and dy to shared memory; S from the state that forward kept every 128 tokens, over the tokens in
//          between, to the stage's start; B = dy v^T of every chunk
//   chunk: S at its start, in registers as G is; dr, dk, dw; the warps exchange G and k~, and each makes dv of 16
//          values, also from A, which forward kept; G at the chunk's start
#pragma once

#include "cuda/device_launch.h"
#include "cuda/element.cuh"
#include "cuda/wkv_backward_state.cuh"
#include "cuda/wkv_backward_tree.cuh"

namespace rwkv {

// ---- dv: all key channels are needed for every value ----

// Positions of 16-byte pieces in the exchange, such that neither the writing nor the reading lanes meet in a bank.
__device__ __forceinline__ int gradient_piece(int channel, int value_pair) {
  return value_pair ^ ((channel & 1) << 2 | (channel & 2));
}
__device__ __forceinline__ int key_piece(int channel, int token_pair) {
  return token_pair ^ ((channel & 3) << 1 | (channel & 1));
}

// [channel g of the warp][value pair]{g and g + 8 of the first value, of the second}
template <int kSize>
__device__ __forceinline__ void publish_gradient(char* to, const KeyRows<kSize>& x) {
  const int group = lane_index() / 4, member = lane_index() % 4;
  static_for<0, kSize / 8>([&](auto q) {
    const auto& tile = x.tile[q.value];
    store_shared(to + (group * (kSize / 2) + gradient_piece(group, 4 * q.value + member)) * 16,
                 make_float4(tile[0], tile[2], tile[1], tile[3]));
  });
}

// [channel g of the warp][token pair]{g of both tokens, g + 8 of both tokens}
__device__ __forceinline__ void publish_keys(char* to, const ChunkValues& k) {
  const int group = lane_index() / 4, member = lane_index() % 4;
  static_for<0, 2>([&](auto half) {
    constexpr int kFirst = 2 * half.value;
    store_shared(to + (group * 8 + key_piece(group, 2 * member + half.value)) * 16,
                 make_float4(round_tf32(k[0][kFirst]), round_tf32(k[0][kFirst + 1]), round_tf32(k[1][kFirst]),
                             round_tf32(k[1][kFirst + 1])));
  });
}

// A product for dv: row g is token 2g, row g + 8 token 2g + 1; column n of tile d is value 2n + d of the warp's 16.
struct ValueRows {
  float tile[2][4] = {};

  // + k~ G over the key channels of the published warps.
  template <class Layout>
  __device__ __forceinline__ void add_keys(const char* gradient, const char* keys) {
    const int group = lane_index() / 4, member = lane_index() % 4;
    static_for<0, Layout::kExchangeWarps>([&](auto j) {
      static_for<0, 2>([&](auto s) {
        const int channel = 4 * s.value + member;
        const float4 k = load_shared<float4>(keys + j.value * Layout::kKeyWarpBytes +
                                             (channel * 8 + key_piece(channel, group)) * 16);
        const float4 b = load_shared<float4>(
            gradient + j.value * Layout::kGradientWarpBytes +
            (channel * (Layout::kSize / 2) + gradient_piece(channel, 8 * warp_index() + group)) * 16);
        const float a[4] = {k.x, k.y, k.z, k.w};
        mma_tf32(tile[0], a, b.x, b.y);
        mma_tf32(tile[1], a, b.z, b.w);
      });
    });
  }

  // + A^T dy; scores[half]: A of tokens 8 half + 2t and + 1 at this lane's two columns; dy: the chunk's rows.
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

  template <class T>
  __device__ __forceinline__ void store(T* to, int64_t stride, int64_t tokens_left) const {
    const int token = lane_index() / 4 * 2;
    T* const at = to + token * stride + 16 * warp_index() + lane_index() % 4 * 4;
    static_for<0, 2>([&](auto e) {
      constexpr int kE = 2 * e.value;
      if (token + e.value < tokens_left)
        store_global(at + e.value * stride, make_uint2(pack<T>(tile[0][kE], tile[1][kE]),
                                                       pack<T>(tile[0][kE + 1], tile[1][kE + 1])));
    });
  }
};

// A of a chunk as add_scores wants it; rows past the end count as 0. from: [token][16].
__device__ __forceinline__ void load_scores(float2 (&scores)[2][2], const float* from, int64_t tokens_left) {
  const int group = lane_index() / 4, member = lane_index() % 4;
  static_for<0, 4>([&](auto i) {
    const int token = 8 * (i.value / 2) + 2 * member + i.value % 2;
    scores[i.value / 2][i.value % 2] =
        token < tokens_left ? load_global<float2>(from + token * kTreeTokens + 2 * group) : make_float2(0.f, 0.f);
  });
}

// ---- results on their way out ----

// The warp's 16 channels of 16 rows from shared to global memory, 16 bytes at a time.
template <class E>
__device__ __forceinline__ void store_rows(E* to, int64_t stride, const char* rows, int pitch, int64_t tokens_left) {
  constexpr int kPieces = static_cast<int>(sizeof(E));  // of a row: 16 channels
  constexpr int kRowsAtOnce = 32 / kPieces;
  const int row = lane_index() / kPieces, byte = lane_index() % kPieces * 16;
  const int channel_bytes = 16 * warp_index() * static_cast<int>(sizeof(E));
  char* const target = reinterpret_cast<char*>(to + row * stride) + channel_bytes + byte;
  const char* const source = rows + row * pitch + channel_bytes + byte;
  static_for<0, kTreeTokens / kRowsAtOnce>([&](auto n) {
    constexpr int kRow = n.value * kRowsAtOnce;
    if (row + kRow < tokens_left)
      store_global(target + kRow * stride * static_cast<int64_t>(sizeof(E)),
                   load_shared<uint4>(source + kRow * pitch));
  });
}

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
    store_chunk<W>(rows + transposed_row<Layout::kDecayPitch>() + 32 * warp_index(), dw);
  } else {
    char* const own =
        rows + lane_index() % 4 * 4 * Layout::kDecayPitch + 4 * (16 * warp_index() + lane_index() / 4);
    static_for<0, 8>([&](auto i) {
      store_shared(own + i.value % 4 * Layout::kDecayPitch + i.value / 4 * 32, dw[i.value / 4][i.value % 4]);
    });
  }
}

// Sums of a warp's channels over the lanes that share one, times factor, to [channel].
__device__ __forceinline__ void store_channel_sums(float* to, const float (&sum)[2], const float (&factor)[2]) {
  static_for<0, 2>([&](auto c) {
    float total = sum[c.value] + shuffle_xor(sum[c.value], 1);
    total += shuffle_xor(total, 2);
    if (lane_index() % 4 == 0)
      store_global(to + 16 * warp_index() + lane_index() / 4 + 8 * c.value, factor[c.value] * total);
  });
}

// ---- the kernel ----

// S after the chunk whose rows of k, v and w are given.
template <class Layout>
__device__ __forceinline__ void advance_state(KeyRows<Layout::kSize>& state, const char* k, const char* v,
                                              const char* w, const float (&constant_exponent)[2]) {
  using T = typename Layout::Activation;
  ChunkDecay decay;
  load_decay<Layout>(decay, w, constant_exponent, kTreeTokens);
  const LevelFactors factors(decay, QuadPlace());
  ChunkValues keys;
  load_chunk<T>(keys, k + transposed_row<Layout::kPitch>() + 32 * warp_index());
  QuadOperand scaled;
  scale_k(scaled, keys, decay);
  const float after[2] = {factors.sibling_after[0] * factors.octet_after[0],
                          factors.sibling_after[1] * factors.octet_after[1]};
  scale(keys, scaled.quad, after);
  advance(state, decay.whole, TokenOperand<T>(keys), v + transposed_row<Layout::kPitch>());
}

template <class T, class W, int kSize, bool kConstantDecay>
__global__ void __launch_bounds__(BackwardLayout<T, W, kSize, kConstantDecay>::kThreads,
                                  BackwardLayout<T, W, kSize, kConstantDecay>::kBlocks)
    wkv_backward_kernel(const __grid_constant__ BackwardTask task) {
  using Layout = BackwardLayout<T, W, kSize, kConstantDecay>;
  constexpr int kPitch = Layout::kPitch;
  const WkvBackwardParams& op = task.op;
  const int64_t heads = op.shape.heads, head = block_index() % heads;
  const Segment segment = segment_of(op.shape, task.work, block_index() / heads);
  if (segment.item.sequence < 0) return;
  const int64_t tokens = segment.item.tokens;
  const int warp = warp_index();
  const QuadPlace place;
  const BackwardShared<Layout> shared;

  // What depends on the channel alone.
  float u[2], constant_exponent[2] = {0.f, 0.f}, du[2] = {0.f, 0.f}, dlogw_sum[2] = {0.f, 0.f};
  static_for<0, 2>([&](auto c) {
    const int channel = 16 * warp + lane_index() / 4 + 8 * c.value;
    u[c.value] = load_element<float>(op.u, head * op.u.head_stride + channel);
    if constexpr (kConstantDecay)
      constant_exponent[c.value] = decay_exponent(load_element<float>(op.w, head * op.w.head_stride + channel));
  });

  const auto matrix_of = [&](const void* matrices, int64_t index) {
    return static_cast<const float*>(matrices) + (index * heads + head) * kSize * kSize;
  };
  KeyRows<kSize> gradient;  // G
  if (!segment.is_last())
    gradient.load(matrix_of(task.segment_dstates, segment.slot));
  else
    gradient.load(op.dstate_out ? matrix_of(op.dstate_out, segment.item.sequence) : nullptr);

  for (int i = thread_index(); i < Layout::kZeroBytes / 16; i += Layout::kThreads)
    store_shared(shared.zeros + 16 * i, make_uint4(0, 0, 0, 0));
  if (!op.dy.data)
    for (int i = thread_index(); i < Layout::kRowsBytes / 16; i += Layout::kThreads)
      store_shared(shared.dy + 16 * i, make_uint4(0, 0, 0, 0));

  const auto copy = [&](auto type, char* to, int pitch, const View& view, int64_t first) {
    using E = typename decltype(type)::type;
    copy_rows<kSize, Layout::kTokens, Layout::kThreads>(to, pitch, start_of<E>(view, segment, head),
                                                        view.token_stride, first, tokens);
  };
  const ElementType<T> activation;
  const ElementType<W> decay_type;
  const float* const scores =
      static_cast<const float*>(op.scores) +
      ((segment.row * heads + head) * op.shape.tokens + segment.item.first_token) * kTreeTokens;

  for (int64_t first = (tokens - 1) / Layout::kTokens * Layout::kTokens; first >= 0 && tokens > 0;
       first -= Layout::kTokens) {
    const int before = static_cast<int>(first % kChunkTokens);  // tokens since a kept state
    block_barrier();  // everyone is done with the rows of the stage after this one
    for (int past = 0; past < before; past += Layout::kTokens) {
      copy(activation, shared.k_before + past * kPitch, kPitch, op.k, first - before + past);
      copy(activation, shared.v_before + past * kPitch, kPitch, op.v, first - before + past);
      if constexpr (!kConstantDecay)
        copy(decay_type, shared.w_before + past * Layout::kDecayPitch, Layout::kDecayPitch, op.w,
             first - before + past);
    }
    copy(activation, shared.k, kPitch, op.k, first);
    copy(activation, shared.v, kPitch, op.v, first);
    if constexpr (!kConstantDecay) copy(decay_type, shared.w, Layout::kDecayPitch, op.w, first);
    copy(activation, shared.r, kPitch, op.r, first);
    if (op.dy.data) copy(activation, shared.dy, kPitch, op.dy, first);
    commit_copies();
    KeyRows<kSize> state;
    state.load(matrix_of(op.chunk_states, segment.first_chunk + first / kChunkTokens));
    wait_copies<0>();  // this thread's rows
    block_barrier();   // everyone's rows

#pragma unroll 1
    for (int past = 0; past < before; past += kTreeTokens)
      advance_state<Layout>(state, shared.k_before + past * kPitch, shared.v_before + past * kPitch,
                            shared.w_before + past * Layout::kDecayPitch, constant_exponent);
    if (before > 0) {
      block_barrier();  // everyone is done with the rows before the stage, whose place the exchange takes
    }
    state.put(shared.state);

#pragma unroll 1
    for (int chunk = warp; chunk < Layout::kChunks; chunk += Layout::kWarps)
      store_pair_scores<T, Layout>(shared, chunk, shared.dy + chunk * kTreeTokens * kPitch + square_row<kPitch>(),
                                   shared.v + chunk * kTreeTokens * kPitch + square_row<kPitch>());
    block_barrier();  // B of all chunks is there

    // Chunks in pairs: the first one's state is kept in registers, the second one's follows from it.
#pragma unroll 1
    for (int pair = Layout::kChunks - 2; pair >= 0; pair -= 2) {
      const auto advance_over = [&](int chunk) {
        advance_state<Layout>(state, shared.k + chunk * kTreeTokens * kPitch, shared.v + chunk * kTreeTokens * kPitch,
                              shared.w + chunk * kTreeTokens * Layout::kDecayPitch, constant_exponent);
      };
      state.get(shared.state);
      KeyRows<kSize> first_state;
#pragma unroll 1
      for (int chunk = 0; chunk <= pair; ++chunk) {
        if (chunk == pair) first_state = state;
        advance_over(chunk);
      }
      static_for<1, -1, -1>([&](auto which) {
        const int chunk = pair + which.value;
        if constexpr (which.value == 0) state = first_state;
        const int64_t token = first + chunk * kTreeTokens, tokens_left = tokens - token;
        const int rows = chunk * kTreeTokens * kPitch, own_row = transposed_row<kPitch>() + rows + 32 * warp;
        char* const w_rows = shared.w + chunk * kTreeTokens * Layout::kDecayPitch;
        float2 chunk_scores[2][2];
        load_scores(chunk_scores, scores + token * kTreeTokens, tokens_left);

        ChunkDecay decay;
        ChunkValues r, k;
        QuadOperand r_scaled, k_scaled;
        load_decay<Layout>(decay, w_rows, constant_exponent, tokens_left);
        load_chunk<T>(r, shared.r + own_row);
        load_chunk<T>(k, shared.k + own_row);
        const LevelFactors factors(decay, place);
        scale_r(r_scaled, r, decay);
        scale_k(k_scaled, k, decay);
        const auto to_border = [](ChunkValues& x, const ChunkValues& y, const float (&a)[2], const float (&b)[2]) {
          const float both[2] = {a[0] * b[0], a[1] * b[1]};
          scale(x, y, both);
        };
        ChunkValues reads, keys;  // r~, k~
        to_border(reads, r_scaled.quad, factors.sibling_before, factors.octet_before);
        to_border(keys, k_scaled.quad, factors.sibling_after, factors.octet_after);

        float dr[2][4], dk[2][4], inner[2];
        contract<T, kPitch>(dr, state, shared.dy + rows + straight_row<kPitch>());
        contract<T, kPitch>(dk, gradient, shared.v + rows + straight_row<kPitch>());
        row_products(inner, state, gradient);

        ValueRows dv;
        publish_keys(shared.keys + warp * Layout::kKeyWarpBytes, keys);
        static_for<0, Layout::kExchangeRounds>([&](auto round) {
          if (warp / Layout::kExchangeWarps == round.value)
            publish_gradient(shared.gradient + warp % Layout::kExchangeWarps * Layout::kGradientWarpBytes, gradient);
          block_barrier();  // G and k~ of this round's warps are there
          dv.add_keys<Layout>(shared.gradient,
                              shared.keys + round.value * Layout::kExchangeWarps * Layout::kKeyWarpBytes);
          block_barrier();  // everyone has read them
        });
        dv.add_scores<T, kPitch>(chunk_scores, shared.dy + rows);
        dv.store(start_of<T>(op.dv, segment, head) + token * op.dv.token_stride, op.dv.token_stride, tokens_left);
        advance(gradient, decay.whole, TokenOperand<T>(reads), shared.dy + rows + transposed_row<kPitch>());

        ChunkGradients gradients;
        chunk_gradients(gradients, dr, dk, inner, r, k, r_scaled, k_scaled, decay, factors, place,
                        PairAddresses<Layout>(shared, chunk));
        add_near_pairs(gradients, du, r, k, u, shared, chunk);

        warp_barrier();  // all lanes have their r, k and w of this chunk, and dr, dk and dw may take the place
        store_chunk<T>(shared.r + own_row, gradients.dr);
        store_chunk<T>(shared.k + own_row, gradients.dk);
        if constexpr (kConstantDecay)
          static_for<0, 8>([&](auto i) {
            if (lane_index() % 4 * 4 + i.value % 4 < tokens_left)
              dlogw_sum[i.value / 4] += gradients.dlogw[i.value / 4][i.value % 4];
          });
        else
          store_decay_gradient<Layout>(w_rows, gradients.dlogw, decay.exponent);
        warp_barrier();  // all lanes' dr, dk and dw are there
        store_rows(start_of<T>(op.dr, segment, head) + token * op.dr.token_stride, op.dr.token_stride, shared.r + rows,
                   kPitch, tokens_left);
        store_rows(start_of<T>(op.dk, segment, head) + token * op.dk.token_stride, op.dk.token_stride, shared.k + rows,
                   kPitch, tokens_left);
        if constexpr (!kConstantDecay)
          store_rows(start_of<W>(op.dw, segment, head) + token * op.dw.token_stride, op.dw.token_stride, w_rows,
                     Layout::kDecayPitch, tokens_left);
      });
    }
  }

  const float one[2] = {1.f, 1.f};
  const int64_t partial = (segment.slot * heads + head) * kSize;
  store_channel_sums(task.du_partial + partial, du, one);
  if constexpr (kConstantDecay) {
    const float minus_rate[2] = {decay_gradient(constant_exponent[0], 1.f), decay_gradient(constant_exponent[1], 1.f)};
    store_channel_sums(task.dw_partial + partial, dlogw_sum, minus_rate);
  }
  if (op.dstate && segment.is_first())
    gradient.store(static_cast<float*>(op.dstate) + (segment.item.sequence * heads + head) * kSize * kSize);
}

template <class T, class W, int kSize, bool kConstantDecay>
int run_wkv_backward(const BackwardTask& task, void* stream) {
  using Layout = BackwardLayout<T, W, kSize, kConstantDecay>;
  return launch(wkv_backward_kernel<T, W, kSize, kConstantDecay>, task.work.items * task.op.shape.heads,
                Layout::kThreads, Layout::kSharedBytes, task, stream);
}

// Blocks of this kernel that the current device holds at once.
template <class T, class W, int kSize, bool kConstantDecay>
int wkv_backward_blocks(int64_t& blocks) {
  using Layout = BackwardLayout<T, W, kSize, kConstantDecay>;
  return resident_blocks(wkv_backward_kernel<T, W, kSize, kConstantDecay>, Layout::kThreads, Layout::kSharedBytes,
                         blocks);
}

}  // namespace rwkv
