// Plans and launches the ops: from run-time sizes and dtypes to the compiled instances (instances/*.cu).
#include <algorithm>

#include "cuda/wkv_instances.h"
#include "cuda/wkv_plan.h"

namespace rwkv {
namespace {

// How many blocks of the chunk kernels the device holds at once: the forward one and, where the backward pass is to
// follow or this is it, the backward one too. 0 where there is no such kernel or no room for one.
struct ChunkSlots {
  int64_t forward = 0;
  int64_t backward = 0;
};

int chunk_slots(const WkvShape&, Dtype, Dtype, bool, ChunkSlots&) { return 0; }

bool kernel_exists(WkvKernel kernel, const WkvShape& shape, int64_t chunk_slots) {
  return has_cuda_head_size(shape.head_size) && (kernel == WkvKernel::kRecurrent || chunk_slots > 0);
}

}  // namespace

int plan_wkv_forward(const WkvForwardParams& p, const WkvForced& forced, WkvPlan& plan) {
  ChunkSlots slots;
  // What saves for backward must run where backward can run too: both read and write the same scores.
  if (const int error = chunk_slots(p.shape, p.r.dtype, p.w.dtype, p.chunk_states != nullptr, slots)) return error;
  const bool chunk = slots.forward > 0 && (!p.chunk_states || slots.backward > 0);
  int64_t pairs = chunk ? slots.forward : 0;
  const WkvKernel kernel = forced.kernel.value_or(choose_kernel(p.shape, p.r.dtype, pairs));
  if (!kernel_exists(kernel, p.shape, pairs)) return kNotSupported;
  if (kernel == WkvKernel::kRecurrent) {
    const int error = with_recurrent_instance(p.shape, [&](auto real, auto size) {
      return wkv_recurrent_forward_blocks<typename decltype(real)::type, size()>(pairs);
    });
    if (error) return error;
  }
  plan = plan_segments(p.shape, WkvPass::kForward, kernel, pairs, forced.segment_tokens);
  return 0;
}

int launch_wkv_forward(const WkvForwardParams& p, const WkvPlan& plan, void* workspace, void* stream) {
  const WkvWorkspace at = workspace_of(p.shape, WkvPass::kForward, plan);
  if (at.list != WkvWorkspace::kAbsent || plan.is_segmented(p.shape)) return kNotSupported;
  ForwardTask task;
  task.op = p;
  task.work = {WkvWorkspace::at<WorkItem>(workspace, at.list), plan.segment_tokens, plan.items};
  task.segment_states = WkvWorkspace::at<float>(workspace, at.states);
  if (plan.kernel == WkvKernel::kRecurrent)
    return with_recurrent_instance(p.shape, [&](auto real, auto size) {
      return run_wkv_recurrent_forward<typename decltype(real)::type, size()>(task, stream);
    });
  return kNotSupported;
}

int plan_wkv_backward(const WkvBackwardParams&, const WkvForced&, WkvPlan&) { return kNotSupported; }
int launch_wkv_backward(const WkvBackwardParams&, const WkvPlan&, void*, void*) { return kNotSupported; }
int plan_wkv_summary(const WkvSummaryParams&, const WkvForced&, WkvPlan&) { return kNotSupported; }
int launch_wkv_summary(const WkvSummaryParams&, const WkvPlan&, void*, void*) { return kNotSupported; }

int launch_wkv_step(const WkvStepParams& p, void* stream) {
  return with_recurrent_instance(p.shape, [&](auto real, auto size) {
    return run_wkv_step<typename decltype(real)::type, size()>(p, stream);
  });
}

}  // namespace rwkv
