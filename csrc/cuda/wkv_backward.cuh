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
#include "cuda/wkv_backward_rows.cuh"
#include "cuda/wkv_backward_state.cuh"
#include "cuda/wkv_backward_tree.cuh"

namespace rwkv {

// ---- dv: all key channels are needed for every value ----

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
  int level;                                         // PairAddresses::lane_level

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
                           result_offset<Layout>(), PairAddresses<Layout>::lane_level()};
    store_four(place(shared), first);
    store_four(place(shared) + 16 * Layout::kThreads, second);
  }
  template <class Layout>
  static __device__ __forceinline__ LaneOffsets get(const BackwardShared<Layout>& shared) {
    const uint4 first = load_shared<uint4>(place(shared));
    const uint4 second = load_shared<uint4>(place(shared) + 16 * Layout::kThreads);
    const auto offset = [](uint32_t x) { return static_cast<int>(x); };
    return {offset(first.x),  offset(first.y),  offset(first.z),  offset(first.w),
            offset(second.x), offset(second.y), offset(second.z), offset(second.w)};
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
    return Rows::row() * Layout::kPitch + Rows::byte();
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

  // to: row 2g, the warp's values from 4t on.
  template <class T>
  __device__ __forceinline__ void store(char* to, int64_t row_bytes, int tokens_left) const {
    const int token = lane_index() / 4 * 2;
    static_for<0, 2>([&](auto e) {
      constexpr int kE = 2 * e.value;
      const uint2 four = make_uint2(pack<T>(tile[0][kE], tile[1][kE]), pack<T>(tile[0][kE + 1], tile[1][kE + 1]));
      if (token + e.value < tokens_left) store_global(to + e.value * row_bytes, four);
    });
  }
};

// A of a chunk as add_scores wants it. dy is 0 past the end, so any row will do there.
__device__ __forceinline__ void load_scores(float2 (&scores)[2][2], const float* chunk, int tokens_left) {
  const float* const from = chunk + lane_index() % 4 * 2 * kTreeTokens + lane_index() / 4 * 2;
  const auto load = [&](int last) {
    static_for<0, 4>([&](auto i) {
      constexpr int kRow = 8 * (i.value / 2) + i.value % 2;
      scores[i.value / 2][i.value % 2] = load_global<float2>(from + (kRow < last ? kRow : last) * kTreeTokens);
    });
  };
  if (tokens_left >= kTreeTokens)
    load(kTreeTokens);
  else
    load(tokens_left - 1 - lane_index() % 4 * 2);
}

// ---- results on their way out ----

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

// next = S after the chunk whose rows of k, v and w are given, and which starts with the given S.
template <class Layout>
__device__ __forceinline__ void advance_state(KeyRows<Layout::kSize>& next, const KeyRows<Layout::kSize>& state,
                                              const char* k, const char* v, const char* w,
                                              const float (&constant_exponent)[2]) {
  using T = typename Layout::Activation;
  ChunkDecay decay;
  load_decay<Layout>(decay, w, constant_exponent, kTreeTokens);
  const LevelFactors factors(decay, QuadPlace());
  ChunkValues keys;
  load_chunk<T>(keys, k + square_row<Layout::kPitch>() + 32 * warp_index());
  QuadOperand scaled;
  scale_k(scaled, keys, decay);
  const float after[2] = {factors.sibling_after[0] * factors.octet_after[0],
                          factors.sibling_after[1] * factors.octet_after[1]};
  scale(keys, scaled.quad, after);
  advance(next, state, decay.whole, TokenOperand<T>(keys), v + square_row<Layout::kPitch>());
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
  const int tokens = static_cast<int>(segment.item.tokens);
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

  const auto matrix_of = [&](auto* matrices, int64_t index) {
    return matrices + (index * heads + head) * kSize * kSize;
  };
  KeyRows<kSize> gradient;  // G
  gradient.clear();
  if (!segment.is_last())
    gradient.load(matrix_of(task.segment_dstates, segment.slot));
  else if (op.dstate_out)
    gradient.load(matrix_of(static_cast<const float*>(op.dstate_out), segment.item.sequence));

  for (int i = thread_index(); i < Layout::kZeroBytes / 16; i += Layout::kThreads)
    store_shared(shared.zeros + 16 * i, make_uint4(0, 0, 0, 0));
  if (!op.dy.data)
    for (int i = thread_index(); i < Layout::kRowsBytes / 16; i += Layout::kThreads)
      store_shared(shared.dy + 16 * i, make_uint4(0, 0, 0, 0));

  if (thread_index() == 0) {
    auto& places = *shared.places;
    store_shared(&places.r, start_of<const T>(op.r, segment, head));
    store_shared(&places.k, start_of<const T>(op.k, segment, head));
    store_shared(&places.v, start_of<const T>(op.v, segment, head));
    store_shared(&places.dy, start_of<const T>(op.dy, segment, head));
    if constexpr (!kConstantDecay) store_shared(&places.w, start_of<const W>(op.w, segment, head));
    store_shared(&places.states, matrix_of(static_cast<const float*>(op.chunk_states), segment.first_chunk));
    store_shared(&places.dstate, op.dstate && segment.is_first()
                                     ? matrix_of(static_cast<float*>(op.dstate), segment.item.sequence)
                                     : nullptr);
    store_shared(&places.scores,
                 static_cast<const float*>(op.scores) +
                     ((segment.row * heads + head) * op.shape.tokens + segment.item.first_token) * kTreeTokens);
    store_shared(&places.tokens, segment.item.tokens);
    store_shared(&places.sums, (segment.slot * heads + head) * kSize);
  }

  const auto place_of = [](auto* field) { return load_shared<std::remove_pointer_t<decltype(field)>>(field); };

  // The chunk in hand goes from the last one of the last stage to the first.
  const int last_stage = tokens > 0 ? (tokens - 1) / Layout::kTokens * Layout::kTokens : -1;
  const int last_chunk = last_stage + Layout::kTokens - kTreeTokens;
  using Rows = WarpRows<T>;
  using DecayRows = WarpRows<W>;
  OutputRows<T> dr_rows(op.dr, segment, head, last_chunk, Rows::row(), Rows::byte());
  OutputRows<T> dk_rows(op.dk, segment, head, last_chunk, Rows::row(), Rows::byte());
  OutputRows<W> dw_rows(op.dw, segment, head, last_chunk, DecayRows::row(), DecayRows::byte());
  OutputRows<T> dv_rows(op.dv, segment, head, last_chunk, lane_index() / 4 * 2,
                        2 * (16 * warp + lane_index() % 4 * 4));
  LaneOffsets::put(shared);

  block_barrier();  // the places are there, and zeros where they are needed
  for (int stage = last_stage; stage >= 0; stage -= Layout::kTokens) {
    const int before = stage % static_cast<int>(kChunkTokens);  // tokens since a kept state
    const int tokens_here = static_cast<int>(place_of(&shared.places->tokens)) - stage;
    const int stage_tokens = tokens_here < Layout::kTokens ? tokens_here : Layout::kTokens;
    const auto copy_state_rows = [&](char* k, char* v, char* w, int token, int wanted) {
      copy_stage<Layout, T, kPitch>(k, place_of(&shared.places->k), op.k.token_stride, token, wanted);
      copy_stage<Layout, T, kPitch>(v, place_of(&shared.places->v), op.v.token_stride, token, wanted);
      if constexpr (!kConstantDecay)
        copy_stage<Layout, W, Layout::kDecayPitch>(w, place_of(&shared.places->w), op.w.token_stride, token, wanted,
                                                   no_decay<W>());
    };
#pragma unroll 1
    for (int past = 0; past < before; past += Layout::kTokens)
      copy_state_rows(shared.k_before + past * kPitch, shared.v_before + past * kPitch,
                      shared.w_before + past * Layout::kDecayPitch, stage - before + past, Layout::kTokens);
    copy_state_rows(shared.k, shared.v, shared.w, stage, stage_tokens);
    copy_stage<Layout, T, kPitch>(shared.r, place_of(&shared.places->r), op.r.token_stride, stage, stage_tokens);
    if (op.dy.data)
      copy_stage<Layout, T, kPitch>(shared.dy, place_of(&shared.places->dy), op.dy.token_stride, stage, stage_tokens);
    commit_copies();
    KeyRows<kSize> state;
    state.load(place_of(&shared.places->states) + stage / kChunkTokens * heads * (kSize * kSize));
    wait_copies<0>();  // this thread's rows
    block_barrier();   // everyone's rows

#pragma unroll 1
    for (int past = 0; past < before; past += kTreeTokens)
      advance_state<Layout>(state, state, shared.k_before + past * kPitch, shared.v_before + past * kPitch,
                            shared.w_before + past * Layout::kDecayPitch, constant_exponent);
    if (before > 0) {
      block_barrier();  // everyone is done with the rows before the stage, whose place the exchange takes
    }
    state.put(shared.state);

#pragma unroll 1
    for (int chunk = warp; chunk < Layout::kChunks; chunk += Layout::kWarps)
      store_pair_scores<T, Layout>(shared, chunk, shared.dy + chunk * kTreeTokens * kPitch,
                                   shared.v + chunk * kTreeTokens * kPitch);
    block_barrier();  // B of all chunks is there

    // Chunks in pairs: the state before the second follows from the state before the first, which is kept; or read
    // again, in heads of 128, where registers are scarcer and there is one pair.
#pragma unroll 1
    for (int pair = Layout::kChunks - 2; pair >= 0; pair -= 2) {
      const auto advance_over = [&](KeyRows<kSize>& next, const KeyRows<kSize>& from, int chunk) {
        advance_state<Layout>(next, from, shared.k + chunk * kTreeTokens * kPitch,
                              shared.v + chunk * kTreeTokens * kPitch,
                              shared.w + chunk * kTreeTokens * Layout::kDecayPitch, constant_exponent);
      };
      KeyRows<kSize> states[2];
      states[0].get(shared.state);
#pragma unroll 1
      for (int chunk = 0; chunk < pair; ++chunk) advance_over(states[0], states[0], chunk);
      advance_over(states[1], states[0], pair);
      static_for<1, -1, -1>([&](auto which) {
        if constexpr (which.value == 0 && Layout::kChunks == 2) states[0].get(shared.state);
        const int chunk = pair + which.value, tokens_left = stage_tokens - chunk * kTreeTokens;
        const LaneOffsets lane = LaneOffsets::get(shared);
        const int rows = chunk * kTreeTokens * kPitch, own_row = lane.own_row + rows;
        char* const w_rows = shared.w + chunk * kTreeTokens * Layout::kDecayPitch;
        float dr[2][4], dk[2][4];
        RowProducts inner;
        contract<T, kPitch>(dr, states[which.value], shared.dy + rows + lane.wide_row,
                            [&](int q, const float (&x)[4]) { inner.add<T>(q, x, gradient.tile[q]); });
        const float inner_sums[2] = {inner.sum(0), inner.sum(1)};

        float2 chunk_scores[2][2];
        load_scores(chunk_scores, place_of(&shared.places->scores) + (stage + chunk * kTreeTokens) * kTreeTokens,
                    tokens_left);

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

        const auto publish = [&](int q, const float (&x)[4]) {
          publish_gradient(shared.gradient, lane.gradient_out, q, x);
        };
        publish_keys(shared.keys, lane.keys_out, keys);
        contract<T, kPitch>(dk, gradient, shared.v + rows + lane.wide_row, [&](int q, const float (&x)[4]) {
          if (Layout::kExchangeRounds == 1 || warp < Layout::kExchangeWarps) publish(q, x);
        });
        ValueRows dv;
        static_for<0, Layout::kExchangeRounds>([&](auto round) {
          block_barrier();  // G of this round's warps is there, and k~
          dv.add_keys<Layout>(
              shared.gradient + lane.gradient_in,
              shared.keys + lane.keys_in + round.value * Layout::kExchangeWarps * Layout::kKeyWarpBytes);
          block_barrier();  // everyone has read them
          if (round.value + 1 < Layout::kExchangeRounds && warp / Layout::kExchangeWarps == round.value + 1)
            for_each_operand<T>(gradient, publish);
        });
        dv.add_scores<T, kPitch>(chunk_scores, shared.dy + rows);
        dv.store<T>(dv_rows.at, dv_rows.row_bytes, tokens_left);
        advance(gradient, gradient, decay.whole, TokenOperand<T>(reads), shared.dy + own_row - 32 * warp);

        ChunkGradients gradients;
        chunk_gradients(gradients, dr, dk, inner_sums, r, k, r_scaled, k_scaled, decay, factors, place,
                        PairAddresses<Layout>(shared, chunk, lane.level));
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
        Rows::store(dr_rows.at, dr_rows.row_bytes, shared.r + rows + lane.result, kPitch, tokens_left);
        Rows::store(dk_rows.at, dk_rows.row_bytes, shared.k + rows + lane.result, kPitch, tokens_left);
        if constexpr (!kConstantDecay)
          DecayRows::store(dw_rows.at, dw_rows.row_bytes,
                           w_rows + (sizeof(T) == sizeof(W) ? lane.result
                                                            : DecayRows::row() * Layout::kDecayPitch +
                                                                  DecayRows::byte()),
                           Layout::kDecayPitch, tokens_left);
        dr_rows.previous_chunk(), dk_rows.previous_chunk(), dw_rows.previous_chunk(), dv_rows.previous_chunk();
      });
    }
    block_barrier();  // everyone is done with the rows of this stage
  }

  const float one[2] = {1.f, 1.f};
  const int64_t sums = place_of(&shared.places->sums);
  store_channel_sums(task.du_partial + sums, du, one);
  if constexpr (kConstantDecay) {
    const float minus_rate[2] = {decay_gradient(constant_exponent[0], 1.f), decay_gradient(constant_exponent[1], 1.f)};
    store_channel_sums(task.dw_partial + sums, dlogw_sum, minus_rate);
  }
  if (float* const dstate = place_of(&shared.places->dstate)) gradient.store(dstate);
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
