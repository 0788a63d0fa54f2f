// From run-time sizes to the compiled instances (instances/*.cu).
#include <cuda_runtime.h>

#include "cuda/wkv_launch.h"

namespace rwkv {

template <class T, int kSize>
void run_wkv_step(const WkvStepParams&, cudaStream_t);  // wkv_step.cuh

template <class T>
cudaError_t step_of_size(const WkvStepParams& p, cudaStream_t stream) {
  switch (p.shape.head_size) {
    case 32: run_wkv_step<T, 32>(p, stream); break;
    case 64: run_wkv_step<T, 64>(p, stream); break;
    case 128: run_wkv_step<T, 128>(p, stream); break;
    default: return cudaErrorNotSupported;
  }
  return cudaGetLastError();
}

int launch_wkv_step(const WkvStepParams& p, void* stream) {
  if (p.shape.batch * p.shape.heads == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  return p.shape.fp64 ? step_of_size<double>(p, on) : step_of_size<float>(p, on);
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace rwkv
