// One small kernel per device primitive, or per group that only makes sense together. They use nothing but the
// primitives, like the kernels in csrc/cuda, so the same file runs on a GPU and in the emulator.
//
// A case reads input_bytes at buffers.in and writes every one of output_bytes at buffers.out. What the numbers mean and
// what the answers must be is in primitive_cases.py, under the same name.
#pragma once

#include "cuda/device_primitives.h"

namespace rwkv {

struct Buffers {
  const void* in;
  void* out;
};

template <class T>
__device__ inline T input(const Buffers& buffers, int64_t index) {
  return load_global<T>(static_cast<const T*>(buffers.in) + index);
}
template <class T>
__device__ inline void output(const Buffers& buffers, int64_t index, T value) {
  store_global<T>(static_cast<T*>(buffers.out) + index, value);
}

// ---- where a thread is: (block, thread, warp, lane) of every thread ----
constexpr int kIndexBlocks = 3, kIndexThreads = 96;

__global__ void indices(const __grid_constant__ Buffers buffers) {
  const int64_t at = 4 * (block_index() * kIndexThreads + thread_index());
  output(buffers, at, static_cast<uint32_t>(block_index()));
  output(buffers, at + 1, static_cast<uint32_t>(thread_index()));
  output(buffers, at + 2, static_cast<uint32_t>(warp_index()));
  output(buffers, at + 3, static_cast<uint32_t>(lane_index()));
}

// ---- barriers: each thread reads what another one wrote, again and again ----
constexpr int kBarrierThreads = 128, kBarrierBytes = 4 * kBarrierThreads, kRounds = 8;

__global__ void block_barriers(const __grid_constant__ Buffers buffers) {
  auto* values = shared_array<uint32_t>(0, kBarrierThreads);
  const int self = thread_index(), other = kBarrierThreads - 1 - self;
  uint32_t value = input<uint32_t>(buffers, self);
  for (int round = 0; round < kRounds; ++round) {
    store_shared<uint32_t>(values + self, value);
    block_barrier();  // every thread's value is in shared memory
    value = 3 * load_shared<uint32_t>(values + other) + static_cast<uint32_t>(self);
    block_barrier();  // every thread has read: the next round may overwrite
  }
  output(buffers, self, value);
}

__global__ void warp_barriers(const __grid_constant__ Buffers buffers) {
  auto* values = shared_array<uint32_t>(0, kBarrierThreads);
  const int self = thread_index(), other = 32 * warp_index() + 31 - lane_index();
  uint32_t value = input<uint32_t>(buffers, self);
  for (int round = 0; round < kRounds; ++round) {
    store_shared<uint32_t>(values + self, value);
    warp_barrier();  // the warp's values are in shared memory
    value = 3 * load_shared<uint32_t>(values + other) + static_cast<uint32_t>(self);
    warp_barrier();  // the warp has read: the next round may overwrite
  }
  output(buffers, self, value);
}

// ---- memory: 32 threads move one V each, from global through shared memory to global ----
constexpr int kMoved = 32;

template <class V>
__global__ void move(const __grid_constant__ Buffers buffers) {
  auto* values = shared_array<V>(0, kMoved);
  store_shared<V>(values + lane_index(), input<V>(buffers, lane_index()));
  warp_barrier();  // the warp's values are in shared memory
  output(buffers, lane_index(), load_shared<V>(values + kMoved - 1 - lane_index()));
}

// ---- asynchronous copies: two groups of 16 bytes a thread; the first must be there while the second may be under way.
// Then the same with every third thread's bytes replaced by zeros.
constexpr int kCopyThreads = 64;

__global__ void copies(const __grid_constant__ Buffers buffers) {
  auto* first = shared_array<uint4>(0, kCopyThreads);
  auto* second = shared_array<uint4>(16 * kCopyThreads, kCopyThreads);
  const auto* from = static_cast<const uint4*>(buffers.in);
  const int self = thread_index(), other = kCopyThreads - 1 - self;
  copy_async(first + self, from + self);
  commit_copies();
  copy_async(second + self, from + kCopyThreads + self);
  commit_copies();
  wait_copies<1>();  // this thread's first group is in shared memory
  block_barrier();   // every thread's first group is
  output(buffers, self, load_shared<uint4>(first + other));
  wait_copies<0>();  // both groups are
  block_barrier();   // every thread's are, and every thread has read the first
  output(buffers, kCopyThreads + self, load_shared<uint4>(second + other));
  copy_async_or_zero(first + self, from + 2 * kCopyThreads + self, self % 3 != 0);
  commit_copies();
  wait_copies<0>();  // the third group is in shared memory
  block_barrier();   // every thread's third group is
  output(buffers, 2 * kCopyThreads + self, load_shared<uint4>(first + other));
}

// ---- exchange in a warp ----
constexpr int kMasks = 31;

__global__ void shuffles(const __grid_constant__ Buffers buffers) {
  const int lane = lane_index();
  const uint32_t bits = input<uint32_t>(buffers, lane);
  const int source = static_cast<int>(input<uint32_t>(buffers, 32 + lane));
  output(buffers, lane, shuffle(bits, source));
  output(buffers, 32 + lane, float_bits(shuffle(float_from_bits(bits), source)));
  for (int mask = 1; mask <= kMasks; ++mask)
    output(buffers, 32 + 32 * mask + lane, float_bits(shuffle_xor(float_from_bits(bits), mask)));
}

// ---- matrices from shared memory: 32 rows of 16 bytes, kRowPitch apart; lane l names row input[l] ----
constexpr int kRowPitch = 48, kRowWords = 4;

template <bool kTransposed>
__global__ void matrices(const __grid_constant__ Buffers buffers) {
  auto* tile = shared_array<char>(0, 32 * kRowPitch);
  const int lane = lane_index();
  store_shared<uint4>(tile + lane * kRowPitch, load_global<uint4>(static_cast<const uint4*>(buffers.in) + lane));
  warp_barrier();  // the tile is in shared memory
  const int row = static_cast<int>(input<uint32_t>(buffers, 32 * kRowWords + lane));
  uint32_t d[4];
  if constexpr (kTransposed)
    load_matrices_transposed(d, tile + row * kRowPitch);
  else
    load_matrices(d, tile + row * kRowPitch);
  for (int m = 0; m < 4; ++m) output(buffers, 4 * lane + m, d[m]);
}

// Lane l brings d[0..3] and names row input[l].
__global__ void matrices_stored(const __grid_constant__ Buffers buffers) {
  auto* tile = shared_array<char>(0, 32 * kRowPitch);
  const int lane = lane_index();
  uint32_t d[4];
  for (int m = 0; m < 4; ++m) d[m] = input<uint32_t>(buffers, 4 * lane + m);
  const int row = static_cast<int>(input<uint32_t>(buffers, 32 * kRowWords + lane));
  store_matrices_transposed(tile + row * kRowPitch, d);
  warp_barrier();  // the tile is in shared memory
  output(buffers, lane, load_shared<uint4>(tile + lane * kRowPitch));
}

// ---- matrix products: kProducts of them, one after another; each lane brings its fragments of a, b and c ----
constexpr int kProducts = 64, kProductWords = 10;
constexpr int64_t kProductsIn = 4 * kProductWords * 32 * kProducts, kProductsOut = 4 * 4 * 32 * kProducts;

template <class T>
__global__ void product16(const __grid_constant__ Buffers buffers) {
  for (int n = 0; n < kProducts; ++n) {
    const int64_t at = kProductWords * (32 * n + lane_index());
    uint32_t a[4];
    float c[4];
    for (int i = 0; i < 4; ++i) a[i] = input<uint32_t>(buffers, at + i);
    for (int i = 0; i < 4; ++i) c[i] = input<float>(buffers, at + 6 + i);
    mma16<T>(c, a, input<uint32_t>(buffers, at + 4), input<uint32_t>(buffers, at + 5));
    for (int i = 0; i < 4; ++i) output(buffers, 4 * (32 * n + lane_index()) + i, c[i]);
  }
}

template <bool kFromZero>
__global__ void product_tf32(const __grid_constant__ Buffers buffers) {
  for (int n = 0; n < kProducts; ++n) {
    const int64_t at = kProductWords * (32 * n + lane_index());
    float a[4], c[4];
    for (int i = 0; i < 4; ++i) a[i] = input<float>(buffers, at + i);
    for (int i = 0; i < 4; ++i) c[i] = input<float>(buffers, at + 6 + i);
    const float b0 = input<float>(buffers, at + 4), b1 = input<float>(buffers, at + 5);
    if constexpr (kFromZero)
      mma_tf32_from_zero(c, a, b0, b1);
    else
      mma_tf32(c, a, b0, b1);
    for (int i = 0; i < 4; ++i) output(buffers, 4 * (32 * n + lane_index()) + i, c[i]);
  }
}

// ---- number formats: kNumbers of them (pairs for pack), 128 threads ----
constexpr int kNumbers = 1 << 16, kNumberThreads = 128;

__global__ void exponentials(const __grid_constant__ Buffers buffers) {
  for (int i = thread_index(); i < kNumbers; i += kNumberThreads)
    output(buffers, i, exp2_fast(input<float>(buffers, i)));
}

__global__ void tf32_numbers(const __grid_constant__ Buffers buffers) {
  for (int i = thread_index(); i < kNumbers; i += kNumberThreads)
    output(buffers, i, float_bits(round_tf32(float_from_bits(input<uint32_t>(buffers, i)))));
}

template <class T>
__global__ void packs(const __grid_constant__ Buffers buffers) {
  for (int i = thread_index(); i < kNumbers; i += kNumberThreads) {
    const float2 pair = input<float2>(buffers, i);
    output(buffers, i, pack<T>(pair.x, pair.y));
  }
}

template <class T>
__global__ void unpacks(const __grid_constant__ Buffers buffers) {
  for (int i = thread_index(); i < kNumbers; i += kNumberThreads)
    output(buffers, i, unpack<T>(input<uint32_t>(buffers, i)));
}

template <class T>
__global__ void unpacks_again(const __grid_constant__ Buffers buffers) {
  for (int i = thread_index(); i < kNumbers; i += kNumberThreads)
    output(buffers, i, unpack_again<T>(input<uint32_t>(buffers, i)));
}

struct Case {
  const char* name;
  void (*kernel)(Buffers);
  int blocks, threads, shared_bytes;
  int64_t input_bytes, output_bytes;
};

inline const Case kCases[] = {
    {"indices", indices, kIndexBlocks, kIndexThreads, 0, 0, 16 * kIndexBlocks * kIndexThreads},
    {"block_barriers", block_barriers, 1, kBarrierThreads, kBarrierBytes, kBarrierBytes, kBarrierBytes},
    {"warp_barriers", warp_barriers, 1, kBarrierThreads, kBarrierBytes, kBarrierBytes, kBarrierBytes},
    {"move_uint16", move<uint16_t>, 1, 32, 2 * kMoved, 2 * kMoved, 2 * kMoved},
    {"move_uint32", move<uint32_t>, 1, 32, 4 * kMoved, 4 * kMoved, 4 * kMoved},
    {"move_float", move<float>, 1, 32, 4 * kMoved, 4 * kMoved, 4 * kMoved},
    {"move_uint2", move<uint2>, 1, 32, 8 * kMoved, 8 * kMoved, 8 * kMoved},
    {"move_float2", move<float2>, 1, 32, 8 * kMoved, 8 * kMoved, 8 * kMoved},
    {"move_uint4", move<uint4>, 1, 32, 16 * kMoved, 16 * kMoved, 16 * kMoved},
    {"move_float4", move<float4>, 1, 32, 16 * kMoved, 16 * kMoved, 16 * kMoved},
    {"copies", copies, 1, kCopyThreads, 32 * kCopyThreads, 48 * kCopyThreads, 48 * kCopyThreads},
    {"shuffles", shuffles, 1, 32, 0, 4 * 64, 4 * 32 * (2 + kMasks)},
    {"matrices", matrices<false>, 1, 32, 32 * kRowPitch, 4 * 32 * (kRowWords + 1), 4 * 32 * 4},
    {"matrices_transposed", matrices<true>, 1, 32, 32 * kRowPitch, 4 * 32 * (kRowWords + 1), 4 * 32 * 4},
    {"matrices_stored", matrices_stored, 1, 32, 32 * kRowPitch, 4 * 32 * (kRowWords + 1), 4 * 32 * 4},
    {"product_bf16", product16<BFloat16>, 1, 32, 0, kProductsIn, kProductsOut},
    {"product_fp16", product16<Float16>, 1, 32, 0, kProductsIn, kProductsOut},
    {"product_tf32", product_tf32<false>, 1, 32, 0, kProductsIn, kProductsOut},
    {"product_tf32_from_zero", product_tf32<true>, 1, 32, 0, kProductsIn, kProductsOut},
    {"exponentials", exponentials, 1, kNumberThreads, 0, 4 * kNumbers, 4 * kNumbers},
    {"tf32_numbers", tf32_numbers, 1, kNumberThreads, 0, 4 * kNumbers, 4 * kNumbers},
    {"packs_bf16", packs<BFloat16>, 1, kNumberThreads, 0, 8 * kNumbers, 4 * kNumbers},
    {"packs_fp16", packs<Float16>, 1, kNumberThreads, 0, 8 * kNumbers, 4 * kNumbers},
    {"unpacks_bf16", unpacks<BFloat16>, 1, kNumberThreads, 0, 4 * kNumbers, 8 * kNumbers},
    {"unpacks_fp16", unpacks<Float16>, 1, kNumberThreads, 0, 4 * kNumbers, 8 * kNumbers},
    {"unpacks_again_bf16", unpacks_again<BFloat16>, 1, kNumberThreads, 0, 4 * kNumbers, 8 * kNumbers},
    {"unpacks_again_fp16", unpacks_again<Float16>, 1, kNumberThreads, 0, 4 * kNumbers, 8 * kNumbers},
};

}  // namespace rwkv
