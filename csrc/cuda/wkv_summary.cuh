// A segment seen from outside, on tensor cores (e_t = exp(-exp(w_t)); equations per token: cpu/wkv_summary.h):
//   W = prod_t e_t         S = sum_t k~_t^T v_t,   k~_t = k_t prod_{s > t} e_s
// so that the state after the segment is W * (state before it) + S. The adjoint reads the same tokens last to first,
// with r for k and dy for v, and gives the share of the segment in the gradient of the state before it.
//
// One block takes one (segment, head), 64 tokens at a time; S stays in registers. A warp owns 16 keys and all values.
// The order of the tokens inside a product is free, so a lane takes 16 consecutive ones for its two keys: the products
// of their decays need no exchange but one per 64 tokens, with the three lanes that hold the other 48.
// k~ is split into two 16-bit numbers, k~ = high + low to 16 bits or more: two products with v, which is exact.
// All products are of numbers in [0, 1]: nothing is divided, no logarithm is subtracted, a decay of 0 is exact.
#pragma once

#include "cuda/decay.cuh"
#include "cuda/device_launch.h"
#include "cuda/element.cuh"
#include "cuda/static_for.h"
#include "cuda/wkv_segments.h"

namespace rwkv {

template <class T, class W, int kSize, bool kConstantDecay>
struct SummaryLayout {
  static constexpr int kWarps = kSize / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kValueTiles = kSize / 8;
  static constexpr int kTokens = 64;      // at a time
  static constexpr int kLaneTokens = 16;  // consecutive, of one lane: a group
  static_assert(kLaneTokens * 4 == kTokens && kChunkTokens % kTokens == 0);

  // Rows are an odd multiple of 16 bytes and groups of 16 rows another 32 apart, so that the eight rows of a matrix,
  // two of each group, lie in different banks.
  static constexpr int kRowBytes = 2 * kSize + 16;  // of k and v
  static constexpr int kGroupBytes = kLaneTokens * kRowBytes + 32;
  static constexpr int kDecayRowBytes = int{sizeof(W)} * kSize + 16;
  static constexpr int kDecayGroupBytes = kLaneTokens * kDecayRowBytes + 32;

  // Shared memory: two stages each, one being filled while the other is used.
  static constexpr int kStageBytes = 4 * kGroupBytes;
  static constexpr int kDecayStageBytes = kConstantDecay ? 0 : 4 * kDecayGroupBytes;
  static constexpr int kK = 0;
  static constexpr int kV = kK + 2 * kStageBytes;
  static constexpr int kW = kV + 2 * kStageBytes;
  static constexpr int kSharedBytes = kW + 2 * kDecayStageBytes;
  // A multiprocessor has 228 KiB (sm_90), of which every block costs 1 KiB more than it asks for.
  static constexpr int kFitting = 228 * 1024 / (kSharedBytes + 1024);
  static constexpr int kWithRegisters = 512 / kThreads;  // leaves 128 to a thread
  static constexpr int kBlocks = kFitting < kWithRegisters ? kFitting : kWithRegisters;  // per multiprocessor, at least
};

// A segment's rows of one tensor in the order in which they are summed.
template <class E>
struct OrderedRows {
  const E* first;
  int64_t stride;  // negative: last to first
};

template <class E>
__device__ __forceinline__ OrderedRows<E> rows_of(const View& view, const Segment& segment, int64_t head,
                                                  bool last_to_first) {
  const E* first = start_of<E>(view, segment, head);
  if (!last_to_first) return {first, view.token_stride};
  return {first + (segment.item.tokens - 1) * view.token_stride, -view.token_stride};
}

// Asks for rows first .. first + 63, 16 bytes a thread; those from `tokens` on arrive as 0.
template <class E, int kSize, int kThreads, int kRowBytes, int kGroupBytes>
__device__ __forceinline__ void copy_stage(char* to, const OrderedRows<E>& rows, int64_t first, int64_t tokens) {
  constexpr int kPieces = kSize * int{sizeof(E)} / 16;  // of a row
  constexpr int kAtOnce = kThreads / kPieces;
  static_assert(16 % kAtOnce == 0 && kThreads % kPieces == 0);
  const int row = thread_index() / kPieces, piece = thread_index() % kPieces;
  const char* from = reinterpret_cast<const char*>(rows.first + (first + row) * rows.stride) + 16 * piece;
  const int64_t step = kAtOnce * rows.stride * int64_t{sizeof(E)};
  to += row * kRowBytes + 16 * piece;
  const auto target = [&](auto n) {
    constexpr int kRow = n.value * kAtOnce;
    return to + kRow / 16 * kGroupBytes + kRow % 16 * kRowBytes;
  };
  if (first + 64 <= tokens) {
    static_for<0, 64 / kAtOnce>([&](auto n) {
      copy_async(target(n), from);
      from += step;
    });
  } else {
    static_for<0, 64 / kAtOnce>([&](auto n) {
      const bool there = first + row + n.value * kAtOnce < tokens;
      copy_async_or_zero(target(n), there ? from : reinterpret_cast<const char*>(rows.first), there);
      from += step;
    });
  }
}

// x0 and x1 as two pairs of 16-bit numbers: x = high + low.
template <class T>
__device__ __forceinline__ void split(float x0, float x1, uint32_t& high, uint32_t& low) {
  high = pack<T>(x0, x1);
  const float2 rounded = unpack<T>(high);
  low = pack<T>(x0 - rounded.x, x1 - rounded.y);
}

// The work of one warp: keys first_key .. + 15 of the state.
template <class T, class W, int kSize, bool kConstantDecay>
class SummaryWarp {
 public:
  using Layout = SummaryLayout<T, W, kSize, kConstantDecay>;

  __device__ __forceinline__ SummaryWarp(const View& w, int64_t head) {
    static_for<0, 4 * Layout::kValueTiles>([&](auto i) { s_[i.value / 4][i.value % 4] = 0.f; });
    if constexpr (kConstantDecay) {
      const int64_t at = head * w.head_stride + key();
      constant_[0] = decay_of(load_element<float>(w, at));
      constant_[1] = decay_of(load_element<float>(w, at + 8));
    }
  }

  // Adds a stage of tokens, of which the first `left` are there.
  __device__ __forceinline__ void add(const char* k_rows, const char* v_rows, const char* w_rows, int64_t left) {
    load_decays(w_rows);
    if (left < Layout::kTokens)  // what is not there decays nothing
      static_for<0, Layout::kLaneTokens>([&](auto i) {
        const bool there = Layout::kLaneTokens * member_ + i.value < left;
        static_for<0, 2>([&](auto h) { e_[h.value][i.value] = there ? e_[h.value][i.value] : 1.f; });
      });

    float after[2];  // product of the decays after the lane's token in hand, one of either key
    static_for<0, 2>([&](auto h) {
      const float whole = decay_stage(h.value, after[h.value]);
      decay_[h.value] *= whole;
      static_for<0, Layout::kValueTiles>([&](auto n) {
        s_[n.value][2 * h.value] *= whole, s_[n.value][2 * h.value + 1] *= whole;
      });
    });

    // Four tokens of each lane at a time, last ones first.
    static_for<3, -1, -1>([&](auto quad) {
      uint32_t k[4], high[4], low[4];
      load_matrices_transposed(k, k_rows + key_address_ + 4 * quad.value * Layout::kRowBytes);
      static_for<1, -1, -1>([&](auto pair) {
        static_for<0, 2>([&](auto h) {
          constexpr int kAt = h.value + 2 * pair.value, kToken = 4 * quad.value + 2 * pair.value;
          const float2 raw = unpack<T>(k[kAt]);
          float& f = after[h.value];
          const float second = raw.y * f;
          f *= e_[h.value][kToken + 1];
          split<T>(raw.x * f, second, high[kAt], low[kAt]);
          f *= e_[h.value][kToken];
        });
      });
      static_for<0, kSize / 32>([&](auto columns) {  // 32 values at a time
        uint32_t v[2][4];
        static_for<0, 2>([&](auto half) {
          load_matrices_transposed(v[half.value], v_rows + value_address_ + 4 * quad.value * Layout::kRowBytes +
                                                      2 * (32 * columns.value + 16 * half.value));
        });
        static_for<0, 4>([&](auto n) {
          const auto& b = v[n.value / 2];
          mma16<T>(s_[4 * columns.value + n.value], high, b[2 * (n.value % 2)], b[2 * (n.value % 2) + 1]);
        });
        static_for<0, 4>([&](auto n) {
          const auto& b = v[n.value / 2];
          mma16<T>(s_[4 * columns.value + n.value], low, b[2 * (n.value % 2)], b[2 * (n.value % 2) + 1]);
        });
      });
    });
  }

  __device__ __forceinline__ void store(float* state, float* decay) const {
    static_for<0, 2>([&](auto h) {
      const int row = key() + 8 * h.value;
      static_for<0, Layout::kValueTiles>([&](auto n) {
        store_global(state + row * kSize + 8 * n.value + 2 * member_,
                     make_float2(s_[n.value][2 * h.value], s_[n.value][2 * h.value + 1]));
      });
      if (decay && member_ == 0) store_global(decay + row, decay_[h.value]);
    });
  }

 private:
  // The lane's first key; its second is 8 further.
  __device__ __forceinline__ int key() const { return 16 * warp_index() + lane_index() / 4; }

  // e_ from w of the lane's tokens and keys.
  __device__ __forceinline__ void load_decays(const char* w_rows) {
    if constexpr (kConstantDecay) {
      static_for<0, Layout::kLaneTokens>(
          [&](auto i) { e_[0][i.value] = constant_[0], e_[1][i.value] = constant_[1]; });
    } else if constexpr (sizeof(W) == 2) {
      static_for<0, 4>([&](auto quad) {
        uint32_t w[4];
        load_matrices_transposed(w, w_rows + key_address_ + 4 * quad.value * Layout::kRowBytes);
        static_for<0, 4>([&](auto at) {
          constexpr int kKey = at.value % 2, kToken = 4 * quad.value + at.value / 2 * 2;
          const float2 raw = unpack<W>(w[at.value]);
          e_[kKey][kToken] = decay_of(raw.x), e_[kKey][kToken + 1] = decay_of(raw.y);
        });
      });
    } else {
      const char* from = w_rows + member_ * Layout::kDecayGroupBytes + 4 * key();
      static_for<0, Layout::kLaneTokens>([&](auto i) {
        e_[0][i.value] = decay_of(load_shared<float>(from + i.value * Layout::kDecayRowBytes));
        e_[1][i.value] = decay_of(load_shared<float>(from + i.value * Layout::kDecayRowBytes + 32));
      });
    }
  }

  // The product of all the stage's decays of one key; `after`: of those of the lanes that hold later tokens.
  __device__ __forceinline__ float decay_stage(int h, float& after) const {
    float product[8];
    static_for<0, 8>([&](auto i) { product[i.value] = e_[h][2 * i.value] * e_[h][2 * i.value + 1]; });
    static_for<0, 4>([&](auto i) { product[i.value] *= product[i.value + 4]; });
    const float own = (product[0] * product[1]) * (product[2] * product[3]);
    const float next = shuffle_xor(own, 1), both = own * next, others = shuffle_xor(both, 2);
    after = (member_ % 2 ? 1.f : next) * (member_ / 2 ? 1.f : others);
    return both * others;
  }

  // Row `lane % 8` of a matrix of tokens: two tokens of each group.
  static __device__ __forceinline__ int row_address(int group_bytes, int row_bytes) {
    const int row = lane_index() % 8;
    return row / 2 * group_bytes + row % 2 * row_bytes;
  }

  const int member_ = lane_index() % 4;
  // Of the four matrices of k, the second has the second 8 keys, the third the next two tokens of each group; of v, the
  // second has the next two tokens, the third the second 8 values.
  const int key_address_ = row_address(Layout::kGroupBytes, Layout::kRowBytes) +
                           lane_index() / 16 * 2 * Layout::kRowBytes +
                           2 * (16 * warp_index() + lane_index() / 8 % 2 * 8);
  const int value_address_ = row_address(Layout::kGroupBytes, Layout::kRowBytes) +
                             lane_index() / 8 % 2 * 2 * Layout::kRowBytes + lane_index() / 16 * 16;
  float s_[Layout::kValueTiles][4];  // [8 values][(key, value): (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)]
  float e_[2][Layout::kLaneTokens];  // decays of the lane's two keys
  float decay_[2] = {1.f, 1.f};      // their product so far
  float constant_[2] = {1.f, 1.f};   // Eagle
};

// Whether anyone needs this segment's summary.
__device__ inline bool is_wanted(const SummaryTask& task, const Segment& segment) {
  if (segment.item.sequence < 0) return false;
  if (task.op.state) return true;
  return task.op.adjoint ? !segment.is_first() : !segment.is_last();
}

template <class T, class W, int kSize, bool kConstantDecay>
__global__ void __launch_bounds__(SummaryLayout<T, W, kSize, kConstantDecay>::kThreads,
                                  SummaryLayout<T, W, kSize, kConstantDecay>::kBlocks)
    wkv_summary_kernel(const __grid_constant__ SummaryTask task) {
  using Layout = SummaryLayout<T, W, kSize, kConstantDecay>;
  const WkvSummaryParams& op = task.op;
  const int64_t head = block_index() % op.shape.heads;
  const Segment segment = segment_of(op.shape, task.work, block_index() / op.shape.heads);
  if (!is_wanted(task, segment)) return;
  const int64_t tokens = segment.item.tokens;

  char* const k_stages = shared_array<char>(Layout::kK, 2 * Layout::kStageBytes);
  char* const v_stages = shared_array<char>(Layout::kV, 2 * Layout::kStageBytes);
  char* const w_stages = kConstantDecay ? nullptr : shared_array<char>(Layout::kW, 2 * Layout::kDecayStageBytes);
  const OrderedRows<T> k = rows_of<T>(op.k, segment, head, op.adjoint);
  const OrderedRows<T> v = op.v.data ? rows_of<T>(op.v, segment, head, op.adjoint) : k;
  const int64_t v_tokens = op.v.data ? tokens : 0;  // an absent dy is 0
  const auto copy_all = [&](int64_t first, int stage) {
    copy_stage<T, kSize, Layout::kThreads, Layout::kRowBytes, Layout::kGroupBytes>(
        k_stages + stage * Layout::kStageBytes, k, first, tokens);
    copy_stage<T, kSize, Layout::kThreads, Layout::kRowBytes, Layout::kGroupBytes>(
        v_stages + stage * Layout::kStageBytes, v, first, v_tokens);
    if constexpr (!kConstantDecay) {
      const OrderedRows<W> w = rows_of<W>(op.w, segment, head, op.adjoint);
      copy_stage<W, kSize, Layout::kThreads, Layout::kDecayRowBytes, Layout::kDecayGroupBytes>(
          w_stages + stage * Layout::kDecayStageBytes, w, first, tokens);
    }
    commit_copies();
  };

  SummaryWarp<T, W, kSize, kConstantDecay> warp(op.w, head);
  if (tokens > 0) copy_all(0, 0);
  int stage = 0;
  for (int64_t first = 0; first < tokens; first += Layout::kTokens) {
    wait_copies<0>();  // this thread's part of the stage has come
    block_barrier();  // and every other thread's; the other stage has been used
    if (first + Layout::kTokens < tokens) copy_all(first + Layout::kTokens, 1 - stage);
    warp.add(k_stages + stage * Layout::kStageBytes, v_stages + stage * Layout::kStageBytes,
             w_stages + stage * Layout::kDecayStageBytes, tokens - first);
    stage = 1 - stage;
  }

  const bool is_result = op.state && segment.item.segments == 1;
  const int64_t place = (is_result ? segment.item.sequence : segment.slot) * op.shape.heads + head;
  float* const state = static_cast<float*>(is_result ? op.state : task.segment_states);
  float* const decay = static_cast<float*>(is_result ? op.decay : task.segment_decays);
  warp.store(state + place * kSize * kSize, decay ? decay + place * kSize : nullptr);
}

template <class T, class W, int kSize, bool kConstantDecay>
int run_wkv_summary(const SummaryTask& task, void* stream) {
  using Layout = SummaryLayout<T, W, kSize, kConstantDecay>;
  return launch(wkv_summary_kernel<T, W, kSize, kConstantDecay>, task.work.items * task.op.shape.heads,
                Layout::kThreads, Layout::kSharedBytes, task, stream);
}

template <class T, class W, int kSize, bool kConstantDecay>
int wkv_summary_blocks(int64_t& blocks) {
  using Layout = SummaryLayout<T, W, kSize, kConstantDecay>;
  return resident_blocks(wkv_summary_kernel<T, W, kSize, kConstantDecay>, Layout::kThreads, Layout::kSharedBytes,
                         blocks);
}

}  // namespace rwkv
