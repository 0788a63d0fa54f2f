// What a cudaError_t means.
#include <cuda_runtime.h>

#include "cuda/wkv_launch.h"

namespace rwkv {

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

bool cuda_error_is_missing_image(int error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ||
         error == cudaErrorInvalidDeviceFunction;
}

}  // namespace rwkv
