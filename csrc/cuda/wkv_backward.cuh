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
#include "cuda/wkv_backward_values.cuh"

namespace rwkv {

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

// What a block carries from the last token to the first, and what it does with one stage or chunk.
template <class Layout>
struct BackwardBlock {
  using T = typename Layout::Activation;
  using W = typename Layout::Decay;
  using Rows = WarpRows<T>;
  using DecayRows = WarpRows<W>;
  static constexpr int kSize = Layout::kSize, kPitch = Layout::kPitch;
  static constexpr bool kConstantDecay = Layout::kConstantDecay;

  const WkvBackwardParams& op;
  const BackwardShared<Layout> shared;
  const QuadPlace place;
  float u[2], constant_exponent[2] = {0.f, 0.f};  // of the lane's channels
  float du[2] = {0.f, 0.f}, dlogw_sum[2] = {0.f, 0.f};
  KeyRows<kSize> gradient;  // G after the chunk in hand
  int last_token, last_stage;  // and the stage's first token; negative: there are none
  OutputRows<T> dr, dk, dv;    // of the chunk in hand, at first the second one of the last pair
  OutputRows<W> dw;

  __device__ __forceinline__ BackwardBlock(const BackwardTask& task, const Segment& segment, int64_t head)
      : op(task.op),
        last_token(static_cast<int>(segment.item.tokens) - 1),
        last_stage(last_token < 0 ? -1 : last_token / Layout::kTokens * Layout::kTokens),
        dr(op.dr, segment, head, last_chunk(), Rows::token(), Rows::byte()),
        dk(op.dk, segment, head, last_chunk(), Rows::token(), Rows::byte()),
        dv(op.dv, segment, head, last_chunk(), ValueRows::row(), 2 * ValueRows::value()),
        dw(op.dw, segment, head, last_chunk(), DecayRows::token(), DecayRows::byte()) {
    static_for<0, 2>([&](auto c) {
      const int channel = 16 * warp_index() + lane_index() / 4 + 8 * c.value;
      u[c.value] = load_element<float>(op.u, head * op.u.head_stride + channel);
      if constexpr (kConstantDecay)
        constant_exponent[c.value] = decay_exponent(load_element<float>(op.w, head * op.w.head_stride + channel));
    });
    const auto matrix_of = [&](auto* matrices, int64_t index) {
      return matrices + (index * op.shape.heads + head) * kSize * kSize;
    };
    gradient.clear();
    if (!segment.is_last())
      gradient.load(matrix_of(task.segment_dstates, segment.slot));
    else if (op.dstate_out)
      gradient.load(matrix_of(static_cast<const float*>(op.dstate_out), segment.item.sequence));

    zero(shared.zeros, Layout::kZeroBytes);
    if (!op.dy.data) zero(shared.dy, Layout::kRowsBytes);
    LaneOffsets::put(shared);
    if (thread_index() == 0) {
      auto& places = *shared.places;
      store_shared(&places.r, start_of<const T>(op.r, segment, head));
      store_shared(&places.k, start_of<const T>(op.k, segment, head));
      store_shared(&places.v, start_of<const T>(op.v, segment, head));
      store_shared(&places.dy, start_of<const T>(op.dy, segment, head));
      if constexpr (!kConstantDecay) store_shared(&places.w, start_of<const W>(op.w, segment, head));
      store_shared(&places.states, matrix_of(static_cast<const float*>(op.chunk_states), segment.first_chunk));
      store_shared(&places.scores, static_cast<const float*>(op.scores) +
                                       ((segment.row * op.shape.heads + head) * op.shape.tokens +
                                        segment.item.first_token) *
                                           kTreeTokens);
      store_shared(&places.dstate, op.dstate && segment.is_first()
                                       ? matrix_of(static_cast<float*>(op.dstate), segment.item.sequence)
                                       : nullptr);
      store_shared(&places.sums, (segment.slot * op.shape.heads + head) * kSize);
      store_shared(&places.tokens, segment.item.tokens);
    }
  }

  __device__ __forceinline__ int last_chunk() const {
    return last_token / (2 * kTreeTokens) * 2 * kTreeTokens + kTreeTokens;
  }

  template <class Field>
  __device__ __forceinline__ Field kept(const Field BackwardPlaces<T, W>::*field) const {
    return load_shared<Field>(&(shared.places->*field));
  }

  // Starts copying what the stage needs, in two groups: k, v and w, also of the tokens before it since a kept state;
  // then r and dy.
  __device__ __forceinline__ void start_copies(int stage, int before, int stage_tokens) const {
    using Places = BackwardPlaces<T, W>;
    const auto copy_state_rows = [&](const StateRows<Layout>& to, int token, int wanted) {
      copy_stage<Layout, T, kPitch>(to.k, kept(&Places::k), op.k.token_stride, token, wanted);
      copy_stage<Layout, T, kPitch>(to.v, kept(&Places::v), op.v.token_stride, token, wanted);
      if constexpr (!kConstantDecay)
        copy_stage<Layout, W, Layout::kDecayPitch>(to.w, kept(&Places::w), op.w.token_stride, token, wanted,
                                                   no_decay<W>());
    };
#pragma unroll 1
    for (int past = 0; past < before; past += Layout::kTokens)
      copy_state_rows(shared.before.from(past), stage - before + past, Layout::kTokens);
    copy_state_rows(shared.state_rows(), stage, stage_tokens);
    commit_copies();
    copy_stage<Layout, T, kPitch>(shared.r, kept(&Places::r), op.r.token_stride, stage, stage_tokens);
    if (op.dy.data)
      copy_stage<Layout, T, kPitch>(shared.dy, kept(&Places::dy), op.dy.token_stride, stage, stage_tokens);
    commit_copies();
  }

  // W and k~ of a chunk. later: decay of the tokens between it and where S is wanted.
  __device__ __forceinline__ TokenOperand<T> chunk_keys(float (&whole)[2], const StateRows<Layout>& chunk,
                                                        const float (&later)[2]) const {
    ChunkDecay decay;
    load_decay<Layout>(decay, chunk.w, constant_exponent, kTreeTokens);
    const LevelFactors factors(decay, QuadPlace());
    ChunkValues keys;
    load_chunk<T>(keys, chunk.k + square_row<kPitch>() + 32 * warp_index());
    QuadOperand scaled;
    scale_k(scaled, keys, decay);
    const float after[2] = {factors.sibling_after[0] * later[0], factors.sibling_after[1] * later[1]};
    scale(keys, scaled.quad, after, factors.octet_after);
    whole[0] = decay.whole[0], whole[1] = decay.whole[1];
    return TokenOperand<T>(keys);
  }
  // next = S after a chunk that starts with the given S.
  __device__ __forceinline__ void advance_state(KeyRows<kSize>& next, const KeyRows<kSize>& state,
                                                const StateRows<Layout>& chunk) const {
    const float one[2] = {1.f, 1.f};
    float whole[2];
    const TokenOperand<T> keys = chunk_keys(whole, chunk, one);
    advance(next, state, whole, keys, chunk.v + square_row<kPitch>());
  }
  // S over two chunks.
  __device__ __forceinline__ void advance_state_twice(KeyRows<kSize>& state, const StateRows<Layout>& chunks) const {
    const StateRows<Layout> second_chunk = chunks.from(kTreeTokens);
    const float one[2] = {1.f, 1.f};
    float first[2], second[2];
    const TokenOperand<T> second_keys = chunk_keys(second, second_chunk, one);
    const TokenOperand<T> first_keys = chunk_keys(first, chunks, second);
    const float both[2] = {first[0] * second[0], first[1] * second[1]};
    const int row = square_row<kPitch>();
    advance(state, state, both, first_keys, second_keys, chunks.v + row, second_chunk.v + row);
  }

  // The gradients of one chunk of the stage, and G before it; state: S before it.
  __device__ __forceinline__ void finish_chunk(const KeyRows<kSize>& state, int stage, int chunk, int tokens_left) {
    const LaneOffsets lane = LaneOffsets::get(shared);
    const int rows = chunk * kTreeTokens * kPitch, own_row = lane.own_row + rows;
    char* const w_rows = shared.w + chunk * kTreeTokens * Layout::kDecayPitch;
    float dr_sums[2][4], dk_sums[2][4];
    RowProducts inner;
    contract<T, kPitch>(dr_sums, state, shared.dy + rows + lane.wide_row,
                        [&](int q, const float (&x)[4]) { inner.add<T>(q, x, gradient.tile[q]); });
    const float inner_sums[2] = {inner.sum(0), inner.sum(1)};
    float2 scores[2][2];
    load_scores(scores, kept(&BackwardPlaces<T, W>::scores) + (stage + chunk * kTreeTokens) * kTreeTokens, tokens_left);

    ChunkDecay decay;
    ChunkValues r, k, reads, keys;  // reads, keys: r~, k~
    QuadOperand r_scaled, k_scaled;
    load_decay<Layout>(decay, w_rows, constant_exponent, tokens_left);
    load_chunk<T>(r, shared.r + own_row);
    load_chunk<T>(k, shared.k + own_row);
    const LevelFactors factors(decay, place);
    scale_r(r_scaled, r, decay);
    scale_k(k_scaled, k, decay);
    scale(reads, r_scaled.quad, factors.sibling_before, factors.octet_before);
    scale(keys, k_scaled.quad, factors.sibling_after, factors.octet_after);

    const auto publish = [&](int q, const float (&x)[4]) {
      publish_gradient(shared.gradient, lane.gradient_out, q, x);
    };
    block_barrier();  // everyone has read what was published of the last chunk
    publish_keys(shared.keys, lane.keys_out, keys);
    contract<T, kPitch>(dk_sums, gradient, shared.v + rows + lane.wide_row, [&](int q, const float (&x)[4]) {
      if (Layout::kExchangeRounds == 1 || warp_index() < Layout::kExchangeWarps) publish(q, x);
    });
    ValueRows values;
    static_for<0, Layout::kExchangeRounds>([&](auto round) {
      block_barrier();  // G of this round's warps is there, and k~
      values.add_keys<Layout>(
          shared.gradient + lane.gradient_in,
          shared.keys + lane.keys_in + round.value * Layout::kExchangeWarps * Layout::kKeyWarpBytes);
      constexpr int kNext = round.value + 1;
      if constexpr (kNext < Layout::kExchangeRounds) {
        block_barrier();  // everyone has read this round's G
        if (warp_index() / Layout::kExchangeWarps == kNext) for_each_operand<T>(gradient, publish);
      }
    });
    values.add_scores<T, kPitch>(scores, shared.dy + rows);
    values.store<T>(dv.at, dv.row_bytes, tokens_left);
    advance(gradient, gradient, decay.whole, TokenOperand<T>(reads), shared.dy + own_row - 32 * warp_index());

    ChunkGradients gradients;
    chunk_gradients(gradients, dr_sums, dk_sums, inner_sums, r, k, r_scaled, k_scaled, decay, factors, place,
                    PairAddresses<Layout>(shared, chunk, lane.pair));
    add_near_pairs(gradients, du, r, k, u, shared, chunk);
    // Since the exchange all lanes have their r, k and w of this chunk, and dr, dk and dw may take the place.
    store_chunk<T>(shared.r + own_row, gradients.dr);
    store_chunk<T>(shared.k + own_row, gradients.dk);
    if constexpr (!kConstantDecay)
      store_decay_gradient<Layout>(w_rows, gradients.dlogw, decay.exponent);
    else
      static_for<0, 8>([&](auto i) {
        if (lane_index() % 4 * 4 + i.value % 4 < tokens_left)
          dlogw_sum[i.value / 4] += gradients.dlogw[i.value / 4][i.value % 4];
      });
    warp_barrier();  // all lanes' dr, dk and dw are there
    Rows::store(dr.at, dr.row_bytes, shared.r + rows + lane.result, kPitch, tokens_left);
    Rows::store(dk.at, dk.row_bytes, shared.k + rows + lane.result, kPitch, tokens_left);
    if constexpr (!kConstantDecay) {
      const int result = sizeof(T) == sizeof(W) ? lane.result : DecayRows::place(Layout::kDecayPitch);
      DecayRows::store(dw.at, dw.row_bytes, w_rows + result, Layout::kDecayPitch, tokens_left);
      dw.previous_chunk();
    }
    dr.previous_chunk(), dk.previous_chunk(), dv.previous_chunk();
  }

  // What is left at the first token: the sums over tokens, and G.
  __device__ __forceinline__ void finish(const BackwardTask& task) {
    using Places = BackwardPlaces<T, W>;
    const int64_t sums = kept(&Places::sums);
    const float one[2] = {1.f, 1.f};
    store_channel_sums(task.du_partial + sums, du, one);
    if constexpr (kConstantDecay) {
      const float minus_rate[2] = {decay_gradient(constant_exponent[0], 1.f),
                                   decay_gradient(constant_exponent[1], 1.f)};
      store_channel_sums(task.dw_partial + sums, dlogw_sum, minus_rate);
    }
    if (float* const dstate = kept(&Places::dstate)) gradient.store(dstate);
  }

 private:
  static __device__ __forceinline__ void zero(char* from, int bytes) {
    for (int i = 16 * thread_index(); i < bytes; i += 16 * Layout::kThreads)
      store_shared(from + i, make_uint4(0, 0, 0, 0));
  }
};

template <class T, class W, int kSize, bool kConstantDecay>
__global__ void __launch_bounds__(BackwardLayout<T, W, kSize, kConstantDecay>::kThreads,
                                  BackwardLayout<T, W, kSize, kConstantDecay>::kBlocks)
    wkv_backward_kernel(const __grid_constant__ BackwardTask task) {
  using Layout = BackwardLayout<T, W, kSize, kConstantDecay>;
  using Places = BackwardPlaces<T, W>;
  const int64_t heads = task.op.shape.heads, head = block_index() % heads;
  const Segment segment = segment_of(task.op.shape, task.work, block_index() / heads);
  if (segment.item.sequence < 0) return;
  BackwardBlock<Layout> block(task, segment, head);
  const BackwardShared<Layout>& shared = block.shared;
  block_barrier();  // the places are there, and zeros where they are needed

  for (int stage = block.last_stage; stage >= 0; stage -= Layout::kTokens) {
    const int before = stage % static_cast<int>(kChunkTokens);  // tokens since a kept state
    const int tokens_left = static_cast<int>(block.kept(&Places::tokens)) - stage;
    const int stage_tokens = tokens_left < Layout::kTokens ? tokens_left : Layout::kTokens;
    block.start_copies(stage, before, stage_tokens);
    KeyRows<kSize> state;
    state.load(block.kept(&Places::states) + stage / kChunkTokens * heads * (kSize * kSize));
    wait_copies<1>();  // this thread's rows of k, v and w
    block_barrier();   // everyone's
#pragma unroll 1
    for (int past = 0; past < before; past += 2 * kTreeTokens)
      block.advance_state_twice(state, shared.before.from(past));
    wait_copies<0>();  // this thread's rows of r and dy
    block_barrier();   // everyone's; and nobody needs the rows before the stage, whose place the exchange takes
    state.put(shared.state);

    static_for<0, Layout::kChunks, Layout::kWarps>([&](auto first) {  // read after an exchange only
      const int chunk = first.value + warp_index();
      if (Layout::kChunks % Layout::kWarps == 0 || chunk < Layout::kChunks)
        store_pair_scores<T, Layout>(shared, chunk, LaneOffsets::get(shared).pair);
    });

    // Chunks in pairs: the state before the second follows from the state before the first, which is kept; or read
    // again, in heads of 128, where registers are scarcer and there is one pair.
#pragma unroll 1
    for (int pair = (stage_tokens - 1) / (2 * kTreeTokens) * 2; pair >= 0; pair -= 2) {
      KeyRows<kSize> states[2];
      states[0].get(shared.state);
#pragma unroll 1
      for (int row = 0; row < pair * kTreeTokens; row += 2 * kTreeTokens)
        block.advance_state_twice(states[0], shared.state_rows().from(row));
      block.advance_state(states[1], states[0], shared.state_rows().from(pair * kTreeTokens));
      block.finish_chunk(states[1], stage, pair + 1, stage_tokens - (pair + 1) * kTreeTokens);
      if constexpr (Layout::kChunks == 2) states[0].get(shared.state);
      block.finish_chunk(states[0], stage, pair, stage_tokens - pair * kTreeTokens);
    }
    block_barrier();  // everyone is done with the rows of this stage
  }
  block.finish(task);
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
