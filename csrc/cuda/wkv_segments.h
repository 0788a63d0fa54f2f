// How a sequence that is cut into segments becomes one again: what the kernels of this job are launched with, and their
// entry points. For one op they run in this order, on one stream:
//   run_wkv_work_list   packed only: which block works on what (wkv_work_list.cuh)
//   run_wkv_summary     decay and state of each segment seen from outside (wkv_summary.cuh)
//   run_wkv_scan        from those the state at every cut (wkv_scan.cuh)
//   the op's own kernel, all segments at once
//   run_wkv_reduce      backward only: du and Eagle's dw from each segment's share (wkv_reduce.cuh)
// The summary ops are the second and third of these with their results as the op's.
#pragma once

#include "cuda/wkv_work.h"

namespace rwkv {

struct WorkListTask {
  WkvShape shape;
  int64_t segment_tokens = 0;
  int64_t items = 0;         // in the list
  WorkItem* list = nullptr;  // output
};

// The segments of a sequence when packed. One that is not much longer than a segment stays whole: cutting it would cost
// another reading of its tokens and, the longest blocks starting first, gain nothing.
RWKV_HOST_DEVICE constexpr int64_t segments_of_length(int64_t tokens, int64_t segment_tokens) {
  return tokens <= 2 * segment_tokens ? 1 : (tokens + segment_tokens - 1) / segment_tokens;
}

// With op.state: the summary op. Sequences of one segment go to op.state and op.decay, segments of the others to
// segment_states and segment_decays, and the scan makes their sequences' results.
// Without: the pass before an op's own kernel. Only segments that others need are summarised: not the last one of a
// sequence, or, for the adjoint, not the first.
struct SummaryTask {
  WkvSummaryParams op;
  WorkSchedule work;
  void* segment_states = nullptr;  // Real [items, H, N, N]
  void* segment_decays = nullptr;  // Real [items, H, N]
};

// Without final_state, in place: each segment's own state becomes the state before it (adjoint: the gradient of the
// state after it); the first (last) segment of a sequence keeps what it has. With it: the sequence's state and decay.
// Sequences of one segment are left alone.
struct ScanTask {
  WkvShape shape;
  WorkSchedule work;
  bool adjoint = false;
  void* segment_states = nullptr;        // Real [items, H, N, N]
  const void* segment_decays = nullptr;  // Real [items, H, N]
  const void* initial = nullptr;         // Real [S, H, N, N]: the op's state, or dstate_out; nullptr: zeros
  void* final_state = nullptr;           // Real [S, H, N, N]
  void* final_decay = nullptr;           // Real [S, H, N]; nullptr: not wanted
};

struct ReduceTask {
  WkvShape shape;
  WorkSchedule work;
  const void* du_partial = nullptr;  // Real [items, H, N]
  const void* dw_partial = nullptr;  // Real [items, H, N]; nullptr: not Eagle
  View du, dw;                       // [H, N], any dtype: output
};

int run_wkv_work_list(const WorkListTask& task, void* stream);

// Activations T in {BFloat16, Float16}, w in {T, float}.
template <class T, class W, int kSize, bool kConstantDecay>
int run_wkv_summary(const SummaryTask& task, void* stream);

// Blocks of that kernel that the current device holds at once.
template <class T, class W, int kSize, bool kConstantDecay>
int wkv_summary_blocks(int64_t& blocks);

// Real in {float, double}.
template <class Real>
int run_wkv_scan(const ScanTask& task, void* stream);
template <class Real>
int run_wkv_reduce(const ReduceTask& task, void* stream);

}  // namespace rwkv
