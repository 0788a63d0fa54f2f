// What the CUDA half offers to wkv_cuda.cpp. No torch and no CUDA type: a stream is void*, an error is a cudaError_t.
#pragma once

#include "wkv_params.h"

namespace rwkv {

// Head sizes with kernels.
inline bool has_cuda_head_size(int64_t size) { return size == 32 || size == 64 || size == 128; }

int launch_wkv_step(const WkvStepParams& params, void* stream);

const char* cuda_error_text(int error);

}  // namespace rwkv
