// The ops on CUDA tensors: device guard, current stream, launch, error to message. Nothing here waits for the device.
#include "cuda/wkv_launch.h"
#include "wkv_prepare.h"

// Weak: a CPU-only torch does not have it, and this library loads there too. setup.py's -ltorch makes it resolve.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace rwkv {
namespace {

void* current_stream(const char* op, int32_t device) {
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream)
    fail<std::runtime_error>(op, ": this torch has no CUDA streams; install a CUDA build of torch");
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    fail<std::runtime_error>(op, ": torch cannot name the current stream of cuda:", device);
  return stream;
}

template <Decay kDecay>
Tensor step(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, Tensor state,
            const OptionalTensor& slots) {
  const char* op = kDecay == Decay::kEagle ? "wkv5_step" : "wkv6_step";
  const StepCall call = prepare_step(op, kDecay, r, k, v, w, u, state, slots);
  if (!has_cuda_head_size(call.params.shape.head_size))
    fail(op, ": head size must be 32, 64 or 128 on CUDA, got ", call.params.shape.head_size, "; run it on the CPU");
  const uintptr_t alignment = 4 * (call.params.shape.fp64 ? sizeof(double) : sizeof(float));  // of the kernel's loads
  if (reinterpret_cast<uintptr_t>(call.params.state) % alignment)
    fail(op, ": state must start at a multiple of ", alignment, " bytes on CUDA, got storage offset ",
         state.storage_offset(), "; call .clone() once and keep the result");
  const int32_t device = r.get_device_index();
  void* stream = current_stream(op, device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (const int error = launch_wkv_step(call.params, stream))
    fail<std::runtime_error>(op, ": launch for r ", shape_text(r), " on cuda:", device,
                             " failed: ", cuda_error_text(error));
  return call.y;
}

}  // namespace
}  // namespace rwkv

STABLE_TORCH_LIBRARY_IMPL(rwkv_ext, CUDA, m) {
  using rwkv::Decay;
  m.impl("wkv5_step", TORCH_BOX(&rwkv::step<Decay::kEagle>));
  m.impl("wkv6_step", TORCH_BOX(&rwkv::step<Decay::kFinch>));
}
