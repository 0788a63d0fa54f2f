// The ops on CUDA tensors: device guard, current stream, plan, workspace, launch, error to message. Nothing here waits
// for the device, so every op can be captured in a graph.
#include <tuple>

#include "cuda/wkv_launch.h"
#include "wkv_prepare.h"
#include "wkv_prepare_summary.h"

// Weak: a CPU-only torch does not have it, and this library loads there too. setup.py's -ltorch makes it resolve.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace rwkv {
namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

void* current_stream(const char* op, int32_t device) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream)
    fail<std::runtime_error>(op, ": this torch has no CUDA streams; install a CUDA build of torch");
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    fail<std::runtime_error>(op, ": torch cannot name the current stream of cuda:", device);
  return stream;
}

// One op on the device of `like`: its current stream, its memory, its errors.
class Device {
 public:
  Device(const char* op, const Tensor& like, int64_t head_size)
      : op_(op), like_(like), stream_(checked_stream(op, like, head_size)), guard_(like.get_device_index()) {
    check(set_cuda_device(like.get_device_index()));
  }

  void* stream() const { return stream_; }

  Tensor workspace(const WkvPlan& plan) const { return new_empty(like_, {plan.workspace_bytes}, ScalarType::Byte); }

  void check(int error) const {
    if (!error) return;
    const std::string what = std::string(op_) + ": launch for shape " + shape_text(like_) + " and dtype " +
                             dtype_text(like_.scalar_type()) + " on " + device_text(like_) + " failed: ";
    if (cuda_error_is_missing_image(error))
      fail<std::runtime_error>(what, "rwkv_ext was built for compute capability " RWKV_CUDA_ARCHS
                               ", which this GPU does not run; rebuild with TORCH_CUDA_ARCH_LIST set to the GPU's own "
                               "(8.0 or newer), as `rwkv-ext doctor` says");
    fail<std::runtime_error>(what, cuda_error_text(error));
  }

 private:
  static void* checked_stream(const char* op, const Tensor& like, int64_t head_size) {
    if (!has_cuda_head_size(head_size))
      fail(op, ": head size must be 32, 64 or 128 on CUDA, got ", head_size, "; run it on the CPU");
    return current_stream(op, like.get_device_index());
  }

  const char* op_;
  const Tensor& like_;
  void* stream_;
  torch::stable::accelerator::DeviceGuard guard_;
};

bool starts_aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % kVectorAlignment == 0;
}

// Every row of channels starts aligned.
bool rows_aligned(const Tensor& x) {
  for (int64_t i = 0; i + 1 < x.dim(); ++i)
    if (x.size(i) > 1 && x.stride(i) * int64_t(x.element_size()) % kVectorAlignment) return false;
  return starts_aligned(x);
}

// The kernels read states, and chunk kernels activations too, 16 bytes at a time.
void align_state(OptionalTensor& state, const void*& data) {
  if (!state || starts_aligned(*state)) return;
  state = contiguous_copy(*state);
  data = state->data_ptr();
}

void align_saved(Tensor& saved, const void*& data) {
  if (!data || starts_aligned(saved)) return;
  saved = contiguous_copy(saved);
  data = saved.data_ptr();
}

void align_rows(Tensor& x, View& view) {
  if (rows_aligned(x)) return;
  x = contiguous_copy(x);
  view = view_of(x);
}

template <class Call>
void align_inputs(Call& call) {
  auto& p = call.params;
  align_rows(call.r, p.r), align_rows(call.k, p.k), align_rows(call.v, p.v);
  if (!p.shape.constant_decay) align_rows(call.w, p.w);
}

template <Decay kDecay>
Forward forward(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                const OptionalTensor& state, const OptionalTensor& cu_seqlens, bool save_for_backward) {
  const char* op = kDecay == Decay::kEagle ? "wkv5" : "wkv6";
  ForwardCall call = prepare_forward(op, kDecay, r, k, v, w, u, state, cu_seqlens, save_for_backward);
  const Device device(op, r, call.params.shape.head_size);
  align_state(call.state, call.params.state);
  // The slots that these lengths leave unused: no op may return what memory happened to hold.
  if (save_for_backward && cu_seqlens) set_zero(call.chunk_states);
  WkvPlan plan;
  device.check(plan_wkv_forward(call.params, {}, plan));
  if (plan.kernel == WkvKernel::kChunk) align_inputs(call);
  const Tensor workspace = device.workspace(plan);
  device.check(launch_wkv_forward(call.params, plan, workspace.data_ptr(), device.stream()));
  return {call.y, call.state_out, call.chunk_states, call.scores};
}

template <Decay kDecay>
Backward backward(const OptionalTensor& dy, const OptionalTensor& dstate_out, const Tensor& r, const Tensor& k,
                  const Tensor& v, const Tensor& w, const Tensor& u, const OptionalTensor& state,
                  const OptionalTensor& cu_seqlens, const Tensor& chunk_states, const Tensor& scores) {
  const char* op = kDecay == Decay::kEagle ? "wkv5_backward" : "wkv6_backward";
  BackwardCall call =
      prepare_backward(op, kDecay, dy, dstate_out, r, k, v, w, u, state, cu_seqlens, chunk_states, scores);
  WkvBackwardParams& p = call.params;
  const Device device(op, r, p.shape.head_size);
  align_state(call.dstate_out, p.dstate_out);
  align_saved(call.chunk_states, p.chunk_states);
  align_saved(call.scores, p.scores);
  p.du = view_of(call.du);
  if (kDecay == Decay::kEagle) p.dw_sum = view_of(call.dw);
  WkvPlan plan;
  device.check(plan_wkv_backward(p, {}, plan));
  if (plan.kernel == WkvKernel::kChunk) {
    align_inputs(call);
    if (call.dy) align_rows(*call.dy, p.dy);
  }
  const Tensor workspace = device.workspace(plan);
  device.check(launch_wkv_backward(p, plan, workspace.data_ptr(), device.stream()));
  return {call.dr, call.dk, call.dv, call.dw, call.du, call.dstate};
}

SummaryCall summarise(const char* op, Decay decay, bool adjoint, const Tensor& k, const Tensor& v, const Tensor& w,
                      const OptionalTensor& cu_seqlens) {
  SummaryCall call = prepare_summary(op, decay, adjoint, k, v, w, cu_seqlens);
  WkvSummaryParams& p = call.params;
  const Device device(op, k, p.shape.head_size);
  WkvPlan plan;
  device.check(plan_wkv_summary(p, {}, plan));
  if (plan.kernel == WkvKernel::kChunk) {
    align_rows(call.k, p.k), align_rows(call.v, p.v);
    if (!p.shape.constant_decay) align_rows(call.w, p.w);
  }
  const Tensor workspace = device.workspace(plan);
  device.check(launch_wkv_summary(p, plan, workspace.data_ptr(), device.stream()));
  return call;
}

template <Decay kDecay>
std::tuple<Tensor, Tensor> summary(const Tensor& k, const Tensor& v, const Tensor& w,
                                   const OptionalTensor& cu_seqlens) {
  const char* op = kDecay == Decay::kEagle ? "wkv5_summary" : "wkv6_summary";
  const SummaryCall call = summarise(op, kDecay, false, k, v, w, cu_seqlens);
  return {call.decay, call.state};
}

template <Decay kDecay>
Tensor adjoint_summary(const Tensor& r, const Tensor& w, const Tensor& dy, const OptionalTensor& cu_seqlens) {
  const char* op = kDecay == Decay::kEagle ? "wkv5_adjoint_summary" : "wkv6_adjoint_summary";
  return summarise(op, kDecay, true, r, dy, w, cu_seqlens).state;
}

template <Decay kDecay>
Tensor step(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, Tensor state,
            const OptionalTensor& slots) {
  const char* op = kDecay == Decay::kEagle ? "wkv5_step" : "wkv6_step";
  const StepCall call = prepare_step(op, kDecay, r, k, v, w, u, state, slots);
  if (!starts_aligned(state))  // a copy could not be updated in place
    fail(op, ": state must start at a multiple of ", kVectorAlignment, " bytes on CUDA, got storage offset ",
         state.storage_offset(), "; call .clone() once and keep the result");
  const Device device(op, r, call.params.shape.head_size);
  device.check(launch_wkv_step(call.params, device.stream()));
  return call.y;
}

}  // namespace
}  // namespace rwkv

STABLE_TORCH_LIBRARY_IMPL(rwkv_ext, CUDA, m) {
  using rwkv::Decay;
  m.impl("wkv5_forward", TORCH_BOX(&rwkv::forward<Decay::kEagle>));
  m.impl("wkv6_forward", TORCH_BOX(&rwkv::forward<Decay::kFinch>));
  m.impl("wkv5_backward", TORCH_BOX(&rwkv::backward<Decay::kEagle>));
  m.impl("wkv6_backward", TORCH_BOX(&rwkv::backward<Decay::kFinch>));
  m.impl("wkv5_summary", TORCH_BOX(&rwkv::summary<Decay::kEagle>));
  m.impl("wkv6_summary", TORCH_BOX(&rwkv::summary<Decay::kFinch>));
  m.impl("wkv5_adjoint_summary", TORCH_BOX(&rwkv::adjoint_summary<Decay::kEagle>));
  m.impl("wkv6_adjoint_summary", TORCH_BOX(&rwkv::adjoint_summary<Decay::kFinch>));
  m.impl("wkv5_step", TORCH_BOX(&rwkv::step<Decay::kEagle>));
  m.impl("wkv6_step", TORCH_BOX(&rwkv::step<Decay::kFinch>));
}
