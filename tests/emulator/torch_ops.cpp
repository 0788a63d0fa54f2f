// The ops on CUDA tensors, wkv_cuda.cpp itself, with the emulated device under them and CPU tensors above: a library that
// takes the place of the CUDA half of rwkv_ext._C in a process that loads it. emulated_device.py does.
#include <cstdlib>

#define TORCH_TARGET_VERSION 0x020b000000000000
#define RWKV_CUDA_ARCHS "the emulator"
#include "torch_api.h"

// Everything of torch is declared: from here on a tensor of the emulated device, a CPU tensor, counts as a CUDA tensor.
#define is_cuda is_cpu
#include "cuda/wkv_cuda.cpp"

// What the CUDA half of torch, and of the CUDA runtime, would answer.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
extern "C" AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
extern "C" AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

namespace rwkv {

// The first thing asked of the CUDA runtime; a test lets it fail by the environment.
int set_cuda_device(int) {
  const char* error = std::getenv("EMULATED_DEVICE_ERROR");
  return error ? std::atoi(error) : 0;
}
const char* cuda_error_text(int error) { return error == 801 ? "operation not supported" : "an error"; }
bool cuda_error_is_missing_image(int error) { return error == 209; }  // cudaErrorNoKernelImageForDevice

}  // namespace rwkv
