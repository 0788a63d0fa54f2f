// The WKV recurrence over whole segments on tensor cores (equations per token: cpu/wkv_recurrence.h). In chunks of 16
// tokens, with r~, k~, W and A of wkv_tree.cuh and S_0 the state before the chunk:
//   y_i = r~_i S_0 + sum_{j <= i} A_ij v_j          S = W S_0 + sum_j k~_j^T v_j
//
// One block takes one (segment, head) and two chunks at a time. The state stays in registers from the first token to
// the last, transposed, as accumulators of matrix products: a warp owns kColumns value columns and all keys. Each
// iteration has two phases with a block barrier between:
//   tree phase   a warp per (chunk, 64 channels) turns tokens into r~, k~, W and A in shared memory
//   state phase  every warp computes its columns of y and updates its part of the state, chunk by chunk
// Loads are asynchronous: v arrives during the tree phase, the next r, k and w during the state phase.
#pragma once

#include "cuda/device_launch.h"
#include "cuda/element.cuh"
#include "cuda/row_copy.cuh"
#include "cuda/wkv_tree.cuh"
#include "cuda/wkv_work.h"

namespace rwkv {

template <class T, class W, int kSize, bool kConstantDecay>
struct ForwardLayout {
  using Tree = TreeLayout<T, kSize>;
  static constexpr int kWarps = kSize == 128 ? 8 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kColumns = kSize / kWarps;     // value columns of a warp
  static constexpr int kColumnTiles = kColumns / 16;  // in tiles of 16
  static constexpr int kKeyTiles = kSize / 8;
  static constexpr int kUnitsPerChunk = kSize / Tree::kChannels;
  static constexpr int kChunks = 2;  // per iteration
  static constexpr int kUnits = kChunks * kUnitsPerChunk;
  static constexpr int kTokens = kChunks * kTreeTokens;
  static_assert(kUnits <= kWarps && kChunkTokens % kTokens == 0 && kTreeTokens == kScoresPerToken);
  static constexpr int kBlocks = kSize == 128 ? 1 : kSize == 64 ? 4 : 6;  // per multiprocessor, at least

  static constexpr int kRowBytes = 2 * kSize + 16;  // of r, k, v
  static constexpr int kDecayRowBytes = static_cast<int>(sizeof(W)) * kSize + 16;
  static constexpr int kScoreFloats = kTreeTokens * Tree::kScorePitch;
  // A unit that has all channels of its chunk keeps X of level 1 where its w was.
  static constexpr bool kReuseDecayRows = !kConstantDecay && kUnitsPerChunk == 1;
  static constexpr int kOperandLevels = kReuseDecayRows ? 2 : 3;
  static constexpr int kOperandBytes = kOperandLevels * Tree::kOperandBytes;  // of a unit
  static_assert(!kReuseDecayRows || kTreeTokens * kDecayRowBytes >= Tree::kOperandBytes);
  // Byte offsets in shared memory.
  static constexpr int kR = 0;
  static constexpr int kK = kR + kTokens * kRowBytes;
  static constexpr int kV = kK + kTokens * kRowBytes;
  static constexpr int kW = kV + kTokens * kRowBytes;
  static constexpr int kOperands = kW + (kConstantDecay ? 0 : kTokens * kDecayRowBytes);
  static constexpr int kRead = kOperands + kUnits * kOperandBytes;
  static constexpr int kWrite = kRead + kChunks * Tree::kReadBytes;
  static constexpr int kScores = kWrite + kChunks * Tree::kWriteBytes;
  static constexpr int kChunkDecay = kScores + kUnits * kScoreFloats * 4;
  static constexpr int kSharedBytes = kChunkDecay + kChunks * kSize * 4;
};

// The state of a warp, transposed: [column tile of 16][key tile of 8] accumulators; element 2h + e of a tile is
// value column g + 8h, key 2t + e of that tile.
template <class Layout>
struct WarpState {
  float s[Layout::kColumnTiles][Layout::kKeyTiles][4];

  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) {  // visit(element, offset in [key][value])
    constexpr int kSize = Layout::kKeyTiles * 8;
    const int group = lane_index() / 4, member = lane_index() % 4;
    const int origin = 2 * member * kSize + warp_index() * Layout::kColumns + group;
    static_for<0, Layout::kColumnTiles>([&](auto m) {
      static_for<0, Layout::kKeyTiles>([&](auto j) {
        static_for<0, 4>([&](auto e) {
          visit(s[m.value][j.value][e.value],
                origin + (8 * j.value + e.value % 2) * kSize + 16 * m.value + 8 * (e.value / 2));
        });
      });
    });
  }
};

template <class T>
__device__ __forceinline__ float state_operand(float s) {
  return std::is_same_v<T, Float16> ? round_tf32(s) : s;
}

// y of one chunk for this warp's columns, and the state after it. v: the chunk's first row in shared memory.
template <class T, class Layout>
__device__ __forceinline__ void advance_state(WarpState<Layout>& state, const char* v, const char* read,
                                              const char* write, const float* scores, const float* chunk_decay,
                                              float (&y)[Layout::kColumnTiles][2][4]) {
  using Tree = typename Layout::Tree;
  const int lane = lane_index(), group = lane / 4, member = lane % 4;
  // v transposed, which tf32 holds exactly, is the first operand of k~^T v and the second of A v.
  float first[Layout::kColumnTiles][2][4];      // [][octet]{column g, g + 8 of token 2t, then of token 2t + 1}
  float2 second[Layout::kColumnTiles][2][2];    // [][octet][column g, g + 8]{token 2t, 2t + 1}
  static_for<0, Layout::kColumnTiles>([&](auto m) {
    uint32_t pairs[4];
    load_matrices_transposed(pairs, v + (lane % 8 + 8 * (lane / 16)) * Layout::kRowBytes +
                                        2 * (warp_index() * Layout::kColumns + 16 * m.value) + lane / 8 % 2 * 16);
    static_for<0, 2>([&](auto octet) {
      static_for<0, 2>([&](auto n) {
        const float2 tokens = unpack<T>(pairs[2 * octet.value + n.value]);
        first[m.value][octet.value][n.value] = tokens.x, first[m.value][octet.value][n.value + 2] = tokens.y;
        second[m.value][octet.value][n.value] = unpack_again<T>(pairs[2 * octet.value + n.value]);
      });
    });
  });

  static_for<0, 2>([&](auto octet) {  // A v; A is 0 right of its diagonal, so the first rows end with the first octet
    float a[4] = {0.f, 0.f, 0.f, 0.f};
    static_for<octet.value, 2>([&](auto half) {
      const float* const from = scores + (group + 8 * half.value) * Tree::kScorePitch + 8 * octet.value + 2 * member;
      float2 row = load_shared<float2>(from);
      static_for<1, Layout::kUnitsPerChunk>([&](auto unit) {
        const float2 part = load_shared<float2>(from + unit.value * Layout::kScoreFloats);
        row.x = round_tf32(row.x + part.x), row.y = round_tf32(row.y + part.y);
      });
      a[half.value] = row.x, a[half.value + 2] = row.y;
    });
    static_for<0, Layout::kColumnTiles>([&](auto m) {
      static_for<0, 2>([&](auto n) {
        const float2 b = second[m.value][octet.value][n.value];
        if constexpr (octet.value == 0)
          mma_tf32_from_zero(y[m.value][n.value], a, b.x, b.y);
        else
          mma_tf32(y[m.value][n.value], a, b.x, b.y);
      });
    });
  });

  static_for<0, Layout::kKeyTiles>([&](auto j) {
    const float4 r = load_shared<float4>(read + j.value * Tree::kReadTilePitch +
                                         (lane * 16 ^ j.value % 2 * Tree::kReadSwap));
    const float4 k = load_shared<float4>(write + group % 2 * Tree::kWritePlane +
                                         (4 * j.value + group / 2) * Tree::kWritePitch + 16 * member);
    const float2 decay = load_shared<float2>(chunk_decay + 8 * j.value + 2 * member);
    const float a[4] = {r.x, r.y, r.z, r.w};
    static_for<0, Layout::kColumnTiles>([&](auto m) {
      auto& s = state.s[m.value][j.value];
      // The state's accumulators are the second operand as they stand. The product drops their low bits, which fp16
      // would show and bf16 does not.
      mma_tf32(y[m.value][0], a, state_operand<T>(s[0]), state_operand<T>(s[1]));
      mma_tf32(y[m.value][1], a, state_operand<T>(s[2]), state_operand<T>(s[3]));
      s[0] *= decay.x, s[1] *= decay.y, s[2] *= decay.x, s[3] *= decay.y;
      mma_tf32(s, first[m.value][0], k.x, k.y);
      mma_tf32(s, first[m.value][1], k.z, k.w);
    });
  });
}

// The decays of two channels at the chunk's 16 tokens; rows: the chunk's rows of w.
// Beyond the last token nothing decays; r, k and v are 0 there.
template <class W, bool kConstantDecay, int kPitch>
__device__ __forceinline__ void load_decays(float2 (&w)[kTreeTokens], const char* rows, int channel,
                                            float2 constant, int64_t tokens_left) {
  static_for<0, kTreeTokens>([&](auto i) {
    if constexpr (kConstantDecay) {
      w[i.value] = constant;
    } else {
      const float2 x = load_pair(reinterpret_cast<const W*>(rows + i.value * kPitch) + channel);
      w[i.value] = make_float2(decay_of(x.x), decay_of(x.y));
    }
  });
  if (tokens_left < kTreeTokens)
    static_for<0, kTreeTokens>([&](auto i) {
      if (i.value >= tokens_left) w[i.value] = make_float2(1.f, 1.f);
    });
}

// A of an iteration's chunks, [tokens][16], for the backward pass.
template <class Layout>
__device__ __forceinline__ void save_scores(float* to, const float* scores, int64_t tokens_left) {
  for (int i = thread_index(); i < Layout::kTokens * 4; i += Layout::kThreads) {
    const int token = i / 4, chunk = token / kTreeTokens;
    if (token >= tokens_left) continue;
    const float* const from = scores + chunk * Layout::kUnitsPerChunk * Layout::kScoreFloats +
                              token % kTreeTokens * Layout::Tree::kScorePitch + i % 4 * 4;
    float4 sum = load_shared<float4>(from);
    static_for<1, Layout::kUnitsPerChunk>([&](auto unit) {
      const float4 part = load_shared<float4>(from + unit.value * Layout::kScoreFloats);
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    });
    store_global(to + 4 * i, sum);
  }
}

// The 16 rows of y that advance_state left, rounded; to: row g at the warp's first column + 2t.
template <class T, class Layout>
__device__ __forceinline__ void store_outputs(T* to, int64_t stride, const float (&y)[Layout::kColumnTiles][2][4],
                                              int64_t tokens_left) {
  static_for<0, 2>([&](auto half) {
    if (lane_index() / 4 + 8 * half.value < tokens_left)
      static_for<0, Layout::kColumnTiles * 2>([&](auto n) {
        const auto& tile = y[n.value / 2][n.value % 2];
        store_global(to + 8 * half.value * stride + 8 * n.value,
                     pack<T>(tile[2 * half.value], tile[2 * half.value + 1]));
      });
  });
}

template <class T, class W, int kSize, bool kConstantDecay>
__global__ void __launch_bounds__(ForwardLayout<T, W, kSize, kConstantDecay>::kThreads,
                                  ForwardLayout<T, W, kSize, kConstantDecay>::kBlocks)
    wkv_forward_kernel(const __grid_constant__ ForwardTask task) {
  using Layout = ForwardLayout<T, W, kSize, kConstantDecay>;
  using Tree = typename Layout::Tree;
  const WkvForwardParams& op = task.op;
  const int64_t heads = op.shape.heads, head = block_index() % heads;
  const Segment segment = segment_of(op.shape, task.work, block_index() / heads);
  if (segment.item.sequence < 0) return;
  const int64_t tokens = segment.item.tokens;

  char* const r_rows = shared_array<char>(Layout::kR, Layout::kTokens * Layout::kRowBytes);
  char* const k_rows = shared_array<char>(Layout::kK, Layout::kTokens * Layout::kRowBytes);
  char* const v_rows = shared_array<char>(Layout::kV, Layout::kTokens * Layout::kRowBytes);
  char* w_rows = nullptr;
  if constexpr (!kConstantDecay) w_rows = shared_array<char>(Layout::kW, Layout::kTokens * Layout::kDecayRowBytes);
  char* const operands = shared_array<char>(Layout::kOperands, Layout::kUnits * Layout::kOperandBytes);
  char* const read = shared_array<char>(Layout::kRead, Layout::kChunks * Tree::kReadBytes);
  char* const write = shared_array<char>(Layout::kWrite, Layout::kChunks * Tree::kWriteBytes);
  float* const scores = shared_array<float>(Layout::kScores, Layout::kUnits * Layout::kScoreFloats);
  float* const chunk_decay = shared_array<float>(Layout::kChunkDecay, Layout::kChunks * kSize);

  const T* const r = start_of<T>(op.r, segment, head);
  const T* const k = start_of<T>(op.k, segment, head);
  const T* const v = start_of<T>(op.v, segment, head);
  const W* const w = kConstantDecay ? nullptr : start_of<W>(op.w, segment, head);
  const auto copy = [&](char* to, int pitch, const auto* from, const View& view, int64_t first) {
    copy_rows<kSize, Layout::kTokens, Layout::kThreads>(to, pitch, from, view.token_stride, first, tokens);
  };
  const auto start_tree_copies = [&](int64_t first) {
    copy(r_rows, Layout::kRowBytes, r, op.r, first);
    copy(k_rows, Layout::kRowBytes, k, op.k, first);
    if constexpr (!kConstantDecay) copy(w_rows, Layout::kDecayRowBytes, w, op.w, first);
    commit_copies();
  };

  // This warp's unit of the tree phase: a chunk and up to 64 of its channels, two to a lane.
  const int warp = warp_index(), chunk = warp / Layout::kUnitsPerChunk % Layout::kChunks;
  const int unit_channel = warp % Layout::kUnitsPerChunk * Tree::kChannels;
  const int channel = unit_channel + 2 * (lane_index() % (Tree::kChannels / 2));
  const int unit_row = chunk * kTreeTokens;
  char* unit_w_rows = nullptr;
  if constexpr (!kConstantDecay) unit_w_rows = w_rows + unit_row * Layout::kDecayRowBytes;
  TreeUnit<T> unit;
  unit.r = reinterpret_cast<const T*>(r_rows + unit_row * Layout::kRowBytes) + unit_channel;
  unit.k = reinterpret_cast<const T*>(k_rows + unit_row * Layout::kRowBytes) + unit_channel;
  unit.row_bytes = Layout::kRowBytes;
  char* const unit_operands = operands + warp % Layout::kUnits * Layout::kOperandBytes;
  static_for<1, 4>([&](auto level) {
    unit.operands[level.value] = unit_operands + level.value % Layout::kOperandLevels * Tree::kOperandBytes;
  });
  if (Layout::kReuseDecayRows) unit.operands[1] = unit_w_rows;
  unit.read = read + chunk * Tree::kReadBytes + unit_channel / 8 * Tree::kReadTilePitch;
  unit.write = write + chunk * Tree::kWriteBytes + unit_channel / 2 * Tree::kWritePitch;
  unit.chunk_decay = chunk_decay + chunk * kSize + unit_channel;
  unit.scores = scores + warp % Layout::kUnits * Layout::kScoreFloats;
  if (Layout::kUnits == Layout::kWarps || warp < Layout::kUnits)  // what chunk_scores never writes: i < 8, j >= 8
    store_shared(unit.scores + lane_index() / 4 * Tree::kScorePitch + 8 + 2 * (lane_index() % 4), float2{0.f, 0.f});
  const auto two_elements = [&](const View& view) {
    const int64_t at = head * view.head_stride + channel;
    return make_float2(load_element<float>(view, at), load_element<float>(view, at + 1));
  };
  float2 bonus = two_elements(op.u), constant_decay = {1.f, 1.f};
  if (lane_index() >= Tree::kChannels / 2) bonus = {0.f, 0.f};  // a lane without channels of its own
  if constexpr (kConstantDecay) {
    const float2 x = two_elements(op.w);
    constant_decay = make_float2(decay_of(x.x), decay_of(x.y));
  }

  WarpState<Layout> state;
  const float* initial = static_cast<const float*>(op.state);
  if (initial) initial += (segment.item.sequence * heads + head) * kSize * kSize;
  if (!segment.is_first()) initial = task.segment_states + (segment.slot * heads + head) * kSize * kSize;
  state.for_each([&](float& s, int at) { s = initial ? load_global<float>(initial + at) : 0.f; });
  const auto save_state = [&](void* states, int64_t index) {
    float* const to = static_cast<float*>(states) + (index * heads + head) * kSize * kSize;
    state.for_each([&](float& s, int at) { store_global(to + at, s); });
  };

  const int64_t y_stride = op.y.token_stride;
  T* const y_corner = start_of<T>(op.y, segment, head) + lane_index() / 4 * y_stride + warp * Layout::kColumns +
                      2 * (lane_index() % 4);
  const int64_t scores_offset =
      ((segment.row * heads + head) * op.shape.tokens + segment.item.first_token) * kTreeTokens;

  if (tokens > 0) start_tree_copies(0);
  for (int64_t first = 0; first < tokens; first += Layout::kTokens) {
    wait_copies<0>();  // this thread's rows of r, k and w
    block_barrier();   // everyone's rows; and the last state phase is over, so v and the tree's results may change
    copy(v_rows, Layout::kRowBytes, v, op.v, first);
    commit_copies();

    if (Layout::kUnits == Layout::kWarps || warp < Layout::kUnits) {  // tree phase
      float2 decays[kTreeTokens];
      load_decays<W, kConstantDecay, Layout::kDecayRowBytes>(decays, unit_w_rows, channel, constant_decay,
                                                             tokens - first - unit_row);
      if (Layout::kReuseDecayRows) {
        warp_barrier();  // every lane has read its w before X takes its place
      }
      const float diagonal = chunk_factors<T, kSize>(unit, decays, bonus);
      warp_barrier();  // X of all lanes is there before its rows are read
      chunk_scores<T, kSize>(unit, diagonal);
    }
    wait_copies<0>();  // this thread's rows of v
    block_barrier();   // everyone's rows and the tree's results; and r, k and w are free for the next tokens
    if (first + Layout::kTokens < tokens) start_tree_copies(first + Layout::kTokens);

    if (op.chunk_states && first % kChunkTokens == 0)
      save_state(op.chunk_states, segment.first_chunk + first / kChunkTokens);
    if (op.scores)
      save_scores<Layout>(static_cast<float*>(op.scores) + scores_offset + first * kTreeTokens, scores, tokens - first);

#pragma unroll
    for (int c = 0; c < Layout::kChunks; ++c) {  // state phase
      float y[Layout::kColumnTiles][2][4];
      advance_state<T>(state, v_rows + c * kTreeTokens * Layout::kRowBytes, read + c * Tree::kReadBytes,
                       write + c * Tree::kWriteBytes, scores + c * Layout::kUnitsPerChunk * Layout::kScoreFloats,
                       chunk_decay + c * kSize, y);
      const int64_t token = first + c * kTreeTokens;
      store_outputs<T, Layout>(y_corner + token * y_stride, y_stride, y, tokens - token);
    }
  }
  if (segment.is_last()) save_state(op.state_out, segment.item.sequence);
}

template <class T, class W, int kSize, bool kConstantDecay>
int run_wkv_forward(const ForwardTask& task, void* stream) {
  using Layout = ForwardLayout<T, W, kSize, kConstantDecay>;
  return launch(wkv_forward_kernel<T, W, kSize, kConstantDecay>, task.work.items * task.op.shape.heads,
                Layout::kThreads, Layout::kSharedBytes, task, stream);
}

// Blocks of this kernel that the current device holds at once.
template <class T, class W, int kSize, bool kConstantDecay>
int wkv_forward_blocks(int64_t& blocks) {
  using Layout = ForwardLayout<T, W, kSize, kConstantDecay>;
  return resident_blocks(wkv_forward_kernel<T, W, kSize, kConstantDecay>, Layout::kThreads, Layout::kSharedBytes,
                         blocks);
}

}  // namespace rwkv
