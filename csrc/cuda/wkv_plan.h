// How an op runs on a GPU: which kernel, how many segments, where things lie in the workspace. Pure arithmetic on sizes
// (no torch, no CUDA), so that a test can ask about any shape and any GPU.
//
// A slot is room for one (segment, head) pair: what the whole GPU works on at once. One segment per sequence is best
// while sequences * heads fill the slots: every byte is read once. Fewer would leave multiprocessors idle; then
// sequences are cut, at the price of reading the tokens once more to find the state at every cut.
#pragma once

#include <algorithm>

#include "cuda/wkv_launch.h"
#include "wkv_params.h"

namespace rwkv {

inline constexpr int64_t kShortTokens = 32;        // fewer: nothing for tensor cores to win
inline constexpr int64_t kShortestSegment = 512;   // a shorter one costs more than it gains
inline constexpr int64_t kWorkspaceAlignment = 256;
inline constexpr int64_t kWorkItemBytes = 32;      // sizeof(WorkItem)

// From this fill of the slots on, cutting gains less than reading the tokens twice costs.
constexpr bool fills(int64_t blocks, int64_t slots) { return 10 * blocks >= 7 * slots; }

// The kernel for these activations. Tensor cores take 16-bit ones; slots are those of the chunk kernel, 0 where the GPU
// has too little shared memory for one.
inline WkvKernel choose_kernel(const WkvShape& shape, Dtype activation, int64_t slots) {
  const bool sixteen_bits = activation == Dtype::kBFloat16 || activation == Dtype::kFloat16;
  return sixteen_bits && shape.tokens >= kShortTokens && slots > 0 ? WkvKernel::kChunk : WkvKernel::kRecurrent;
}

constexpr int64_t in_chunks(int64_t tokens) { return chunks_of(tokens) * kChunkTokens; }

// More than any sequence has, so that no sequence is cut.
constexpr int64_t uncut_tokens(const WkvShape& shape) { return in_chunks(shape.tokens + 1); }

// Into how many segments to cut each of `blocks` equal sequences, at most `most`. Segments take turns in whole waves of
// the slots, so the best number is just below a multiple of them; more than one wave only where it idles less.
inline int64_t choose_segments(int64_t blocks, int64_t slots, int64_t most) {
  int64_t best = 1;
  double best_use = 0;
  for (int64_t waves = 1; waves <= 3; ++waves) {
    const int64_t segments = std::clamp<int64_t>(waves * slots / blocks, 1, std::max<int64_t>(most, 1));
    const int64_t taken = (blocks * segments + slots - 1) / slots * slots;
    const double use = static_cast<double>(blocks * segments) / static_cast<double>(taken);
    if (waves == 1 || use > best_use + 0.05) best = segments, best_use = use;
  }
  return best;
}

// Tokens per segment: a multiple of kChunkTokens. The host does not know packed lengths, only their sum: there two
// thirds of a slot's share of all tokens is the measure, and sequences that are not much longer stay whole
// (segments_of_length).
inline int64_t choose_segment_tokens(const WkvShape& shape, int64_t slots) {
  const int64_t blocks = shape.cu_seqlens ? shape.heads : shape.sequences * shape.heads;
  if (blocks == 0 || slots <= 0 || fills(blocks, slots)) return uncut_tokens(shape);
  int64_t tokens;
  if (shape.cu_seqlens) {
    tokens = std::max(kShortestSegment, shape.tokens * shape.heads * 2 / (3 * slots));
  } else {
    const int64_t segments = choose_segments(blocks, slots, shape.tokens / kShortestSegment);
    if (segments < 2) return uncut_tokens(shape);
    tokens = (shape.tokens + segments - 1) / segments;
  }
  tokens = in_chunks(tokens);
  return tokens < shape.tokens ? tokens : uncut_tokens(shape);
}

// Segments in all; an upper bound when packed: every sequence may end in a partial one.
constexpr int64_t items_of(const WkvShape& shape, int64_t segment_tokens) {
  if (shape.cu_seqlens) return shape.tokens / segment_tokens + shape.sequences;
  const int64_t segments = (shape.tokens + segment_tokens - 1) / segment_tokens;
  return shape.sequences * std::max<int64_t>(segments, 1);
}

enum class WkvPass { kForward, kBackward, kSummary };

// Byte offsets of the pieces of the workspace; kAbsent: not needed.
struct WkvWorkspace {
  static constexpr int64_t kAbsent = -1;

  int64_t list = kAbsent;    // WorkItem [items]: where sequences are packed
  int64_t states = kAbsent;  // Real [items, H, N, N]: states, or gradients of states, at the cuts
  int64_t decays = kAbsent;  // Real [items, H, N]: decay of each segment
  int64_t du = kAbsent;      // Real [items, H, N]: shares of du
  int64_t dw = kAbsent;      // Real [items, H, N]: shares of Eagle's dw
  int64_t bytes = 0;         // so far

  // Appends a piece.
  constexpr int64_t take(int64_t piece_bytes) {
    const int64_t offset = bytes;
    bytes += (piece_bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return offset;
  }

  // A piece's address; nullptr where it is absent.
  template <class T>
  static T* at(void* workspace, int64_t offset) {
    return offset == kAbsent ? nullptr : reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
  }
};

inline WkvWorkspace workspace_of(const WkvShape& shape, WkvPass pass, const WkvPlan& plan) {
  const int64_t real_bytes = shape.fp64 ? 8 : 4;
  const int64_t channels = plan.items * shape.heads * shape.head_size * real_bytes;
  WkvWorkspace workspace;
  if (shape.cu_seqlens) workspace.list = workspace.take(plan.items * kWorkItemBytes);
  if (plan.is_segmented(shape)) {
    workspace.states = workspace.take(channels * shape.head_size);
    workspace.decays = workspace.take(channels);
  }
  if (pass == WkvPass::kBackward) {
    workspace.du = workspace.take(channels);
    if (shape.constant_decay) workspace.dw = workspace.take(channels);
  }
  return workspace;
}

// The plan for a kernel of which the GPU holds `slots` at once. forced_segment_tokens: see WkvForced.
inline WkvPlan plan_segments(const WkvShape& shape, WkvPass pass, WkvKernel kernel, int64_t slots,
                             int64_t forced_segment_tokens = 0) {
  WkvPlan plan;
  plan.kernel = kernel;
  plan.segment_tokens = choose_segment_tokens(shape, slots);
  if (forced_segment_tokens > 0)
    plan.segment_tokens = forced_segment_tokens < shape.tokens ? forced_segment_tokens : uncut_tokens(shape);
  plan.items = items_of(shape, plan.segment_tokens);
  plan.workspace_bytes = workspace_of(shape, pass, plan).bytes;
  return plan;
}

}  // namespace rwkv
