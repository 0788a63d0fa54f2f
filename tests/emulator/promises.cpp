// Small kernels that keep or break one rule each; test_emulator.py names the one to run and says what must come of it.
// What a kernel computed is printed, one float a line.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

#include "cuda/device_launch.h"
#include "cuda/device_primitives.h"

namespace rwkv {

struct Arrays {
  const float* in;  // [kIn] 0, 1, 2, ...
  float* out;       // [kOut]
};
constexpr int kIn = 256, kOut = 64;

__device__ float sum_of_four(float4 x) { return x.x + x.y + x.z + x.w; }

// Two groups of copies, each waited for and then read across the block. The template flags leave one rule out.
enum class Without { kNothing, kWait, kBarrier, kCommit, kLastWait };

template <Without kWithout>
__global__ void __launch_bounds__(64) copy_kernel(const __grid_constant__ Arrays p) {
  float4* first = shared_array<float4>(0, 64);
  float4* second = shared_array<float4>(1024, 64);
  const int self = thread_index(), other = 63 - self;
  copy_async(first + self, p.in + 4 * (self % 32));
  if (kWithout != Without::kCommit) commit_copies();
  copy_async_or_zero(second + self, p.in + 128 + 4 * (self % 32), self % 2 == 0);
  if (kWithout != Without::kCommit) commit_copies();
  if (kWithout != Without::kWait) wait_copies<1>();
  if (kWithout != Without::kBarrier) block_barrier();
  float sum = sum_of_four(load_shared<float4>(first + other));
  if (kWithout != Without::kLastWait) wait_copies<0>();
  block_barrier();
  sum += 1000 * sum_of_four(load_shared<float4>(second + other));
  store_global(p.out + self, sum);
}

// The same for the barrier of a warp; shuffles in between must not count as one.
template <bool kBarrier>
__global__ void warp_kernel(const __grid_constant__ Arrays p) {
  float* values = shared_array<float>(0, 64);
  const int self = thread_index();
  store_shared(values + self, load_global<float>(p.in + self));
  const float mine = shuffle_xor(1.0f, 1);
  if (kBarrier) warp_barrier();
  store_global(p.out + self, mine + load_shared<float>(values + (self ^ 5)));
}

// The rows that load_matrices reads are another lane's; nothing but the barrier orders that.
template <bool kBarrier>
__global__ void matrix_kernel(const __grid_constant__ Arrays p) {
  float4* rows = shared_array<float4>(0, 64);
  const int self = thread_index();
  store_shared(rows + self, load_global<float4>(p.in + 4 * (self % 32)));
  if (kBarrier) warp_barrier();
  uint32_t d[4];
  load_matrices(d, rows + (self ^ 1));
  store_global(p.out + self, float_from_bits(d[0]));
}
__global__ void matrix_overread_kernel(const __grid_constant__ Arrays p) {
  float4* rows = shared_array<float4>(0, 64);
  uint32_t d[4];
  load_matrices_transposed(d, rows + 64);
  store_global(p.out + thread_index(), float_from_bits(d[0]));
}

// Passes a barrier, writes, and goes on to the next barrier while others have not yet left the first: still a race.
__global__ void late_reader_kernel(const __grid_constant__ Arrays p) {
  float* value = shared_array<float>(0, 1);
  if (thread_index() == 0) store_shared(value, 1.0f);
  block_barrier();
  if (thread_index() == 0) store_shared(value, 2.0f);
  const float read = thread_index() == 40 ? load_shared<float>(value) : 0.0f;
  block_barrier();
  if (thread_index() == 40) store_global(p.out, read);
}

__global__ void two_blocks_kernel(const __grid_constant__ Arrays p) {  // both write the same 32 places
  block_barrier();
  if (warp_index() == 0) store_global(p.out + lane_index(), 1.0f);
}
__global__ void own_places_kernel(const __grid_constant__ Arrays p) {
  float* value = shared_array<float>(0, 32);
  store_shared(value + lane_index(), 1.0f * block_index());
  warp_barrier();
  store_global(p.out + 32 * block_index() + lane_index(), load_shared<float>(value + 31 - lane_index()));
}

__global__ void overrun_kernel(const __grid_constant__ Arrays p) {
  float* values = shared_array<float>(0, 64);
  store_shared(values + thread_index() + 1, 0.0f);
  store_global(p.out + thread_index(), 0.0f);
}
__global__ void overread_kernel(const __grid_constant__ Arrays p) {
  float* values = shared_array<float>(0, 64);
  store_global(p.out + thread_index(), load_shared<float>(values + thread_index() + 1));
}
__global__ void global_overread_kernel(const __grid_constant__ Arrays p) {
  store_global(p.out + thread_index(), load_global<float>(p.in + kIn - 63 + thread_index()));
}
__global__ void copy_overread_kernel(const __grid_constant__ Arrays p) {
  float4* values = shared_array<float4>(0, 64);
  copy_async_or_zero(values + thread_index(), p.in + kIn, false);
  commit_copies();
  wait_copies<0>();
}
__global__ void overlap_kernel(const __grid_constant__ Arrays) {
  shared_array<float>(0, 64);
  shared_array<float>(128, 64);
}
__global__ void too_much_kernel(const __grid_constant__ Arrays) { shared_array<float>(2048, 64); }
__global__ void two_counts_kernel(const __grid_constant__ Arrays) { shared_array<float>(0, 1 + thread_index()); }
__global__ void uninitialised_kernel(const __grid_constant__ Arrays p) {
  store_global(p.out + thread_index(), load_shared<float>(shared_array<float>(0, 64) + thread_index()));
}
__global__ void misaligned_shared_kernel(const __grid_constant__ Arrays p) {
  store_global(p.out, load_shared<float2>(shared_array<float>(0, 64) + 1).x);
}
__global__ void misaligned_offset_kernel(const __grid_constant__ Arrays p) {
  store_global(p.out, load_shared<float4>(shared_array<float>(8, 64)).x);
}
__global__ void misaligned_global_kernel(const __grid_constant__ Arrays p) {
  store_global(p.out, load_global<float4>(p.in + 2).x);
}
__global__ void misaligned_copy_kernel(const __grid_constant__ Arrays p) {
  copy_async(shared_array<float>(0, 64), p.in + 1);
}
__global__ void wrong_memory_kernel(const __grid_constant__ Arrays p) { store_global(p.out, load_shared<float>(p.in)); }

__global__ void divergent_kernel(const __grid_constant__ Arrays p) {
  float value = 0;
  if (lane_index() < 16)
    value = shuffle_xor(1.0f, 1);
  else
    value = shuffle_xor(2.0f, 1);
  store_global(p.out + thread_index(), value);
}
__global__ void divergent_kinds_kernel(const __grid_constant__ Arrays) {
  if (lane_index() == 7)
    warp_barrier();
  else
    shuffle_xor(1.0f, 1);
}
__global__ void early_end_kernel(const __grid_constant__ Arrays) {
  if (thread_index() == 5) return;
  block_barrier();
}
__global__ void two_barriers_kernel(const __grid_constant__ Arrays) {
  if (lane_index() == 0) block_barrier();
  warp_barrier();
}

int run(const std::string& name, const Arrays& arrays) {
  struct Choice {
    void (*kernel)(Arrays);
    int blocks = 1, threads = 64;
  };
  const std::map<std::string, Choice> choices = {
      {"copies", {copy_kernel<Without::kNothing>}},
      {"missing-wait", {copy_kernel<Without::kWait>}},
      {"missing-barrier", {copy_kernel<Without::kBarrier>}},
      {"missing-commit", {copy_kernel<Without::kCommit>}},
      {"missing-last-wait", {copy_kernel<Without::kLastWait>}},
      {"warp-barrier", {warp_kernel<true>}},
      {"missing-warp-barrier", {warp_kernel<false>}},
      {"matrix-barrier", {matrix_kernel<true>}},
      {"missing-matrix-barrier", {matrix_kernel<false>}},
      {"matrix-overread", {matrix_overread_kernel}},
      {"late-reader", {late_reader_kernel}},
      {"two-blocks", {two_blocks_kernel, 2}},
      {"own-places", {own_places_kernel, 2, 32}},
      {"overrun", {overrun_kernel}},
      {"overread", {overread_kernel}},
      {"global-overread", {global_overread_kernel}},
      {"copy-overread", {copy_overread_kernel}},
      {"overlap", {overlap_kernel}},
      {"too-much", {too_much_kernel}},
      {"two-counts", {two_counts_kernel}},
      {"uninitialised", {uninitialised_kernel}},
      {"misaligned-shared", {misaligned_shared_kernel}},
      {"misaligned-offset", {misaligned_offset_kernel}},
      {"misaligned-global", {misaligned_global_kernel}},
      {"misaligned-copy", {misaligned_copy_kernel}},
      {"wrong-memory", {wrong_memory_kernel}},
      {"divergent", {divergent_kernel}},
      {"divergent-kinds", {divergent_kinds_kernel}},
      {"early-end", {early_end_kernel}},
      {"two-barriers", {two_barriers_kernel}},
  };
  const auto found = choices.find(name);
  if (found == choices.end()) return 2;
  const Choice& choice = found->second;
  return launch(choice.kernel, choice.blocks, choice.threads, 2048, arrays, nullptr);
}

}  // namespace rwkv

int main(int count, char** words) {
  if (count != 3) return 2;
  const std::string order = words[2];
  emulator::set_thread_order(order == "ascending"    ? emulator::ThreadOrder::kAscending
                             : order == "descending" ? emulator::ThreadOrder::kDescending
                                                     : emulator::ThreadOrder::kRandom,
                             std::strtoull(words[2], nullptr, 10));
  auto* in = static_cast<float*>(std::aligned_alloc(16, rwkv::kIn * sizeof(float)));
  auto* out = static_cast<float*>(std::aligned_alloc(16, rwkv::kOut * sizeof(float)));
  for (int i = 0; i < rwkv::kIn; ++i) in[i] = static_cast<float>(i);
  for (int i = 0; i < rwkv::kOut; ++i) out[i] = -1.0f;
  if (const int error = rwkv::run(words[1], {in, out})) return error;
  for (int i = 0; i < rwkv::kOut; ++i) std::printf("%g\n", static_cast<double>(out[i]));
  for (const emulator::Launch& launch : emulator::launches())
    std::printf("launch: %s, read %lld bytes, written %lld bytes\n", launch.kernel.c_str(),
                static_cast<long long>(launch.bytes_read), static_cast<long long>(launch.bytes_written));
  std::free(in);
  std::free(out);
}
