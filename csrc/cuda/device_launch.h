// Host side of a kernel launch: errors are cudaError_t as int, a stream is void*. The emulator has its own version.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <map>
#include <utility>

namespace rwkv {

inline constexpr int kNotSupported = cudaErrorNotSupported;

// The runtime keeps the last error until it is asked for it; a later launch must not be blamed.
inline int forget(cudaError_t error) {
  cudaGetLastError();
  return error;
}

// Launches blocks * threads of kernel(params) with shared_bytes of dynamic shared memory. Does not wait.
template <class Params>
int launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, const Params& params, void* stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024)  // more than a kernel gets without asking; the device remembers, not the process
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
      return forget(error);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

// How many blocks of the kernel the current device holds at once; 0 where its shared memory is too small for one.
// Asked once per thread, kernel and device: every op asks, and the answer takes microseconds.
template <class Params>
int resident_blocks(void (*kernel)(Params), int threads, int shared_bytes, int64_t& blocks) {
  thread_local std::map<std::pair<void (*)(Params), int>, int64_t> known;
  int device = 0, processors = 0, most_shared = 0, each = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return forget(error);
  if (const auto found = known.find({kernel, device}); found != known.end()) {
    blocks = found->second;
    return cudaSuccess;
  }
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return forget(error);
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return forget(error);
  if (shared_bytes > most_shared) {
    blocks = known[{kernel, device}] = 0;
    return cudaSuccess;
  }
  if (shared_bytes > 48 * 1024)
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
      return forget(error);
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes))
    return forget(error);
  blocks = known[{kernel, device}] = static_cast<int64_t>(processors) * each;
  return cudaSuccess;
}

}  // namespace rwkv
