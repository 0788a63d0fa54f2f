// What emulator/run.cpp needs of the emulator, for a GPU: the same program, built by nvcc, runs the same problems there.
// The order of threads and the number of multiprocessors are the GPU's own; launches are not recorded.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

namespace emulator {

enum class ThreadOrder { kAscending, kDescending, kRandom };
inline void set_thread_order(ThreadOrder, uint64_t) {}

struct Device {
  int multiprocessors = 0, most_shared_bytes = 0;
};
inline Device& device() {
  static Device unused;
  return unused;
}

struct Launch {
  std::string kernel;
  int64_t blocks = 0;
  int threads = 0, shared_bytes = 0;
  int64_t bytes_read = 0, distinct_bytes_read = 0, bytes_written = 0;
};
inline std::vector<Launch> launches() { return {}; }

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  std::fprintf(stderr, "%s\n", text.str().c_str());
  std::exit(1);
}

// ---- memory: device pointers, each array alone in an allocation that ends with its last byte ----

inline void check(const char* call, cudaError_t error) {
  if (error) fail(call, ": ", cudaGetErrorString(error));
}

// The bytes start as NaN.
inline void* allocate(int64_t bytes, int64_t remainder = 0) {
  void* memory = nullptr;
  check("cudaMalloc", cudaMalloc(&memory, bytes + remainder ? bytes + remainder : 1));
  check("cudaMemset", cudaMemset(memory, 0xff, bytes + remainder));
  return static_cast<char*>(memory) + remainder;
}

inline void release(void* memory) { check("cudaFree", cudaFree(memory)); }  // of an array without a remainder

inline void write_array(void* to, const char* from, int64_t bytes) {
  check("cudaMemcpy", cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}

// Waits for the kernels, and reports what went wrong in them.
inline void read_array(char* to, const void* from, int64_t bytes) {
  check("a kernel, or cudaMemcpy", cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

}  // namespace emulator
