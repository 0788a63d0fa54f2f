// Plans and launches the ops: from run-time sizes and dtypes to the compiled instances (instances/*.cu).
#include <algorithm>

#include "cuda/wkv_instances.h"
#include "cuda/wkv_plan.h"

namespace rwkv {
namespace {

// How many blocks of an op's chunk kernel the device holds at once; 0 where there is none or no room for one.
template <class Query>
int chunk_slots(const WkvShape& shape, Dtype activation, Dtype decay, int64_t& slots, const Query& query) {
  slots = 0;
  if (activation != Dtype::kBFloat16 && activation != Dtype::kFloat16) return 0;
  return with_chunk_instance(shape, activation, decay, query);
}

int forward_slots(const WkvShape& shape, Dtype activation, Dtype decay, int64_t& slots) {
  return chunk_slots(shape, activation, decay, slots, [&](auto instance) { return instance.forward_blocks(slots); });
}

int backward_slots(const WkvShape& shape, Dtype activation, Dtype decay, int64_t& slots) {
  return chunk_slots(shape, activation, decay, slots, [&](auto instance) { return instance.backward_blocks(slots); });
}

int summary_slots(const WkvShape& shape, Dtype activation, Dtype decay, int64_t& slots) {
  return chunk_slots(shape, activation, decay, slots, [&](auto instance) { return instance.summary_blocks(slots); });
}

int recurrent_forward_slots(const WkvShape& shape, int64_t& pairs) {
  return with_recurrent_instance(shape, [&](auto instance) { return instance.forward_blocks(pairs); });
}

int recurrent_backward_needs(const WkvShape& shape, RecurrentBackwardNeeds& needs) {
  return with_recurrent_instance(shape, [&](auto instance) { return instance.backward_needs(needs); });
}

template <class Task>
int run_chunk(const WkvShape& shape, Dtype activation, Dtype decay, const Task& task, void* stream) {
  return with_chunk_instance(shape, activation, decay, [&](auto instance) { return instance.run(task, stream); });
}

template <class Task>
int run_recurrent(const WkvShape& shape, const Task& task, void* stream) {
  return with_recurrent_instance(shape, [&](auto instance) { return instance.run(task, stream); });
}

// The kernel to use, given the slots of the chunk kernel; false where a test insists on one that cannot run.
bool choose(const WkvShape& shape, Dtype activation, int64_t slots, const WkvForced& forced, WkvKernel& kernel) {
  kernel = forced.kernel.value_or(choose_kernel(shape, activation, slots));
  return has_cuda_head_size(shape.head_size) && (kernel == WkvKernel::kRecurrent || slots > 0);
}

// The recurrent backward kernel's own pieces of the workspace, after those that every op has.
struct RecurrentScratch {
  int64_t block_states = WkvWorkspace::kAbsent;
  int64_t dv_shares = WkvWorkspace::kAbsent;
};

RecurrentScratch take_scratch(const WkvBackwardParams& p, const RecurrentBackwardNeeds& needs, const WkvPlan& plan,
                              WkvWorkspace& workspace) {
  const WkvShape& shape = p.shape;
  RecurrentScratch scratch;
  scratch.block_states = workspace.take(plan.blocks * needs.scratch_bytes);
  if (needs.dv_shares && p.r.dtype != Dtype::kFloat32 && p.r.dtype != Dtype::kFloat64)
    scratch.dv_shares = workspace.take(shape.batch * shape.tokens * shape.heads * shape.head_size * int64_t{4});
  return scratch;
}

// Plans an op whose kernels need no scratch of their own; slots are those of its chunk kernel.
int plan_without_scratch(const WkvShape& shape, WkvPass pass, Dtype activation, int64_t slots, const WkvForced& forced,
               WkvPlan& plan) {
  WkvKernel kernel;
  if (!choose(shape, activation, slots, forced, kernel)) return kNotSupported;
  if (kernel == WkvKernel::kRecurrent)
    if (const int error = recurrent_forward_slots(shape, slots)) return error;
  plan = plan_segments(shape, pass, kernel, slots, forced.segment_tokens);
  return 0;
}

static_assert(sizeof(WorkItem) == kWorkItemBytes);

// Which block works on what; packed, a kernel writes that down first.
int make_schedule(const WkvShape& shape, const WkvPlan& plan, const WkvWorkspace& at, void* workspace, void* stream,
                  WorkSchedule& work) {
  WorkItem* list = WkvWorkspace::at<WorkItem>(workspace, at.list);
  work = {list, plan.segment_tokens, plan.items};
  return list ? run_wkv_work_list({shape, plan.segment_tokens, plan.items, list}, stream) : 0;
}

int run_summary(WkvKernel kernel, const SummaryTask& task, void* stream) {
  const WkvSummaryParams& p = task.op;
  if (kernel == WkvKernel::kRecurrent) return run_recurrent(p.shape, task, stream);
  return run_chunk(p.shape, p.k.dtype, p.w.dtype, task, stream);
}

int run_scan(const ScanTask& task, void* stream) {
  return task.shape.fp64 ? run_wkv_scan<double>(task, stream) : run_wkv_scan<float>(task, stream);
}

// The state at every cut before (adjoint: its gradient after) the op's own kernel runs on all segments at once.
int find_cut_states(const WkvSummaryParams& p, WkvKernel kernel, const WorkSchedule& work, const void* initial,
                    void* states, void* decays, void* stream) {
  if (kernel == WkvKernel::kChunk) {  // another kernel than the op's: its shared memory may not fit where that one does
    int64_t slots = 0;
    if (const int error = summary_slots(p.shape, p.k.dtype, p.w.dtype, slots)) return error;
    if (slots == 0) kernel = WkvKernel::kRecurrent;
  }
  if (const int error = run_summary(kernel, {p, work, states, decays}, stream)) return error;
  ScanTask scan;
  scan.shape = p.shape, scan.work = work, scan.adjoint = p.adjoint;
  scan.segment_states = states, scan.segment_decays = decays, scan.initial = initial;
  return run_scan(scan, stream);
}

int run_recurrent_backward(const BackwardTask& task, const WkvPlan& plan, WkvWorkspace at, void* workspace,
                           void* stream) {
  RecurrentBackwardNeeds needs;
  if (const int error = recurrent_backward_needs(task.op.shape, needs)) return error;
  const RecurrentScratch scratch = take_scratch(task.op, needs, plan, at);
  RecurrentBackwardTask recurrent;
  recurrent.op = task.op, recurrent.work = task.work, recurrent.segment_dstates = task.segment_dstates;
  recurrent.du_partial = task.du_partial, recurrent.dw_partial = task.dw_partial;
  recurrent.blocks = plan.blocks;
  recurrent.block_states = WkvWorkspace::at<void>(workspace, scratch.block_states);
  recurrent.dv_shares = WkvWorkspace::at<void>(workspace, scratch.dv_shares);
  return run_recurrent(task.op.shape, recurrent, stream);
}

}  // namespace

int plan_wkv_forward(const WkvForwardParams& p, const WkvForced& forced, WkvPlan& plan) {
  int64_t slots = 0, backward = 0;
  if (const int error = forward_slots(p.shape, p.r.dtype, p.w.dtype, slots)) return error;
  if (p.chunk_states) {  // what saves for backward runs where backward can run too: both use the same scores
    if (const int error = backward_slots(p.shape, p.r.dtype, p.w.dtype, backward)) return error;
    if (backward == 0) slots = 0;
  }
  return plan_without_scratch(p.shape, WkvPass::kForward, p.r.dtype, slots, forced, plan);
}

int launch_wkv_forward(const WkvForwardParams& p, const WkvPlan& plan, void* workspace, void* stream) {
  const WkvWorkspace at = workspace_of(p.shape, WkvPass::kForward, plan);
  ForwardTask task;
  task.op = p;
  if (const int error = make_schedule(p.shape, plan, at, workspace, stream, task.work)) return error;
  if (plan.is_segmented(p.shape)) {
    float* states = WkvWorkspace::at<float>(workspace, at.states);
    WkvSummaryParams summary;
    summary.shape = p.shape, summary.k = p.k, summary.v = p.v, summary.w = p.w;
    if (const int error = find_cut_states(summary, plan.kernel, task.work, p.state, states,
                                          WkvWorkspace::at<void>(workspace, at.decays), stream))
      return error;
    task.segment_states = states;
  }
  if (plan.kernel == WkvKernel::kRecurrent) return run_recurrent(p.shape, task, stream);
  return run_chunk(p.shape, p.r.dtype, p.w.dtype, task, stream);
}

int plan_wkv_backward(const WkvBackwardParams& p, const WkvForced& forced, WkvPlan& plan) {
  int64_t slots = 0, forward = 0;
  if (const int error = forward_slots(p.shape, p.r.dtype, p.w.dtype, forward)) return error;
  if (const int error = backward_slots(p.shape, p.r.dtype, p.w.dtype, slots)) return error;
  if (forward == 0) slots = 0;
  WkvKernel kernel;
  if (!choose(p.shape, p.r.dtype, slots, forced, kernel)) return kNotSupported;
  if (kernel == WkvKernel::kChunk) {
    plan = plan_segments(p.shape, WkvPass::kBackward, kernel, slots, forced.segment_tokens);
    return 0;
  }
  RecurrentBackwardNeeds needs;
  if (const int error = recurrent_backward_needs(p.shape, needs)) return error;
  plan = plan_segments(p.shape, WkvPass::kBackward, kernel, needs.pairs, forced.segment_tokens);
  // A few for each slot, so that none waits long for the last of unequal ones; the scratch grows with them.
  plan.blocks = std::min(plan.items * p.shape.heads, 4 * std::max<int64_t>(needs.pairs, 1));
  WkvWorkspace at = workspace_of(p.shape, WkvPass::kBackward, plan);
  take_scratch(p, needs, plan, at);
  plan.workspace_bytes = at.bytes;
  return 0;
}

int launch_wkv_backward(const WkvBackwardParams& p, const WkvPlan& plan, void* workspace, void* stream) {
  const WkvWorkspace at = workspace_of(p.shape, WkvPass::kBackward, plan);
  BackwardTask task;
  task.op = p;
  task.du_partial = WkvWorkspace::at<float>(workspace, at.du);
  task.dw_partial = WkvWorkspace::at<float>(workspace, at.dw);
  if (const int error = make_schedule(p.shape, plan, at, workspace, stream, task.work)) return error;
  if (plan.is_segmented(p.shape)) {
    float* dstates = WkvWorkspace::at<float>(workspace, at.states);
    WkvSummaryParams summary;
    summary.shape = p.shape, summary.k = p.r, summary.v = p.dy, summary.w = p.w, summary.adjoint = true;
    if (const int error = find_cut_states(summary, plan.kernel, task.work, p.dstate_out, dstates,
                                          WkvWorkspace::at<void>(workspace, at.decays), stream))
      return error;
    task.segment_dstates = dstates;
  }
  if (const int error = plan.kernel == WkvKernel::kRecurrent
                            ? run_recurrent_backward(task, plan, at, workspace, stream)
                            : run_chunk(p.shape, p.r.dtype, p.w.dtype, task, stream))
    return error;
  ReduceTask reduce;
  reduce.shape = p.shape, reduce.work = task.work;
  reduce.du_partial = task.du_partial, reduce.dw_partial = task.dw_partial;
  reduce.du = p.du, reduce.dw = p.dw_sum;
  return p.shape.fp64 ? run_wkv_reduce<double>(reduce, stream) : run_wkv_reduce<float>(reduce, stream);
}

int plan_wkv_summary(const WkvSummaryParams& p, const WkvForced& forced, WkvPlan& plan) {
  int64_t slots = 0;
  if (const int error = summary_slots(p.shape, p.k.dtype, p.w.dtype, slots)) return error;
  return plan_without_scratch(p.shape, WkvPass::kSummary, p.k.dtype, slots, forced, plan);
}

int launch_wkv_summary(const WkvSummaryParams& p, const WkvPlan& plan, void* workspace, void* stream) {
  const WkvWorkspace at = workspace_of(p.shape, WkvPass::kSummary, plan);
  SummaryTask task;
  task.op = p;
  task.segment_states = WkvWorkspace::at<void>(workspace, at.states);
  task.segment_decays = WkvWorkspace::at<void>(workspace, at.decays);
  if (const int error = make_schedule(p.shape, plan, at, workspace, stream, task.work)) return error;
  if (const int error = run_summary(plan.kernel, task, stream)) return error;
  if (!plan.is_segmented(p.shape)) return 0;
  ScanTask scan;
  scan.shape = p.shape, scan.work = task.work, scan.adjoint = p.adjoint;
  scan.segment_states = task.segment_states, scan.segment_decays = task.segment_decays;
  scan.final_state = p.state, scan.final_decay = p.decay;
  return run_scan(scan, stream);
}

int launch_wkv_step(const WkvStepParams& p, void* stream) {
  return run_recurrent(p.shape, p, stream);
}

}  // namespace rwkv
