// Runs every case of cases.cuh: nvcc makes the program for a GPU, g++ (-x c++, with the emulator's headers before
// csrc) the one for a CPU. It needs no torch.
//
//   device_primitives list           one line per case: name, input bytes, output bytes
//   device_primitives run IN OUT     IN: the inputs of all cases in that order; OUT: their outputs, likewise
#include "cases.cuh"
#include "cuda/device_launch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

using rwkv::Case;

[[noreturn]] void fail(const char* what, const char* why) {
  std::fprintf(stderr, "device_primitives: %s: %s\n", what, why);
  std::exit(1);
}

// Memory that a kernel can reach, filled with 0xa5 before the kernel runs.
#ifdef __CUDACC__
void check(const char* what, int error) {
  if (error != cudaSuccess) fail(what, cudaGetErrorString(static_cast<cudaError_t>(error)));
}
struct DeviceMemory {
  explicit DeviceMemory(int64_t bytes) {
    check("cudaMalloc", cudaMalloc(&data, bytes ? bytes : 16));
    check("cudaMemset", cudaMemset(data, 0xa5, bytes));
  }
  ~DeviceMemory() { cudaFree(data); }
  void write(const char* from, int64_t bytes) {
    check("cudaMemcpy", cudaMemcpy(data, from, bytes, cudaMemcpyHostToDevice));
  }
  void read(char* to, int64_t bytes) { check("cudaMemcpy", cudaMemcpy(to, data, bytes, cudaMemcpyDeviceToHost)); }
  void* data = nullptr;
};
#else
void check(const char* what, int error) {
  if (error) fail(what, "the emulator refused the launch");
}
struct DeviceMemory {
  explicit DeviceMemory(int64_t bytes) : data(std::aligned_alloc(256, (bytes + 256) / 256 * 256)) {
    std::memset(data, 0xa5, bytes);
  }
  ~DeviceMemory() { std::free(data); }
  void write(const char* from, int64_t bytes) { std::memcpy(data, from, bytes); }
  void read(char* to, int64_t bytes) { std::memcpy(to, data, bytes); }
  void* data;
};
#endif

std::vector<char> run(const Case& one, const char* input) {
  DeviceMemory in(one.input_bytes), out(one.output_bytes);
  in.write(input, one.input_bytes);
  check(one.name, rwkv::launch(one.kernel, one.blocks, one.threads, one.shared_bytes, rwkv::Buffers{in.data, out.data},
                               nullptr));
  std::vector<char> result(one.output_bytes);
  out.read(result.data(), one.output_bytes);  // waits for the kernel, and reports what it did wrong
  return result;
}

std::vector<char> read_file(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  if (!file) fail(path, "cannot be read");
  std::vector<char> bytes;
  char block[1 << 16];
  while (const size_t got = std::fread(block, 1, sizeof block, file)) bytes.insert(bytes.end(), block, block + got);
  std::fclose(file);
  return bytes;
}

void run_all(const char* in_path, const char* out_path) {
  const std::vector<char> inputs = read_file(in_path);
  size_t expected = 0;
  for (const Case& one : rwkv::kCases) expected += one.input_bytes;
  if (inputs.size() != expected) fail(in_path, "must hold exactly the inputs that `list` names");
  std::FILE* file = std::fopen(out_path, "wb");
  if (!file) fail(out_path, "cannot be written");
  const char* input = inputs.data();
  for (const Case& one : rwkv::kCases) {
    const std::vector<char> output = run(one, input);
    input += one.input_bytes;
    if (std::fwrite(output.data(), 1, output.size(), file) != output.size()) fail(out_path, "cannot be written");
  }
  if (std::fclose(file)) fail(out_path, "cannot be written");
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && !std::strcmp(arguments[1], "list")) {
    for (const Case& one : rwkv::kCases)
      std::printf("%s %lld %lld\n", one.name, static_cast<long long>(one.input_bytes),
                  static_cast<long long>(one.output_bytes));
    return 0;
  }
  if (count != 4 || std::strcmp(arguments[1], "run")) fail("usage", "device_primitives list | run IN OUT");
  run_all(arguments[2], arguments[3]);
}
