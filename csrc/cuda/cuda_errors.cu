// What is asked of the CUDA runtime itself: the current device, and what an error means.
#include <cuda_runtime.h>

#include "cuda/wkv_launch.h"

namespace rwkv {

int set_cuda_device(int index) {
  const cudaError_t error = cudaSetDevice(index);
  if (error) cudaGetLastError();  // or a later launch would be blamed for it
  return error;
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

bool cuda_error_is_missing_image(int error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ||
         error == cudaErrorInvalidDeviceFunction;
}

}  // namespace rwkv
