// The names of csrc/cuda/device_primitives.h on a CPU, with every promise checked that the hardware leaves to the
// programmer: alignment, which memory an address is in, whole warps, copies that are waited for. What each one does is
// said there. This header shadows the other by coming first among the include directories.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "async_copies.h"
#include "block.h"
#include "device.h"
#include "number_formats.h"
#include "shared_memory.h"
#include "vocabulary.h"
#include "warp_operations.h"

namespace rwkv {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

using SourceLine = std::source_location;  // every primitive takes its caller's, for messages

// ---- where this thread is ----
inline int thread_index() { return emulator::running_thread(); }
inline int lane_index() { return emulator::running_thread() % 32; }
inline int warp_index() { return emulator::running_thread() / 32; }
inline int64_t block_index() { return emulator::running_block(); }

// ---- barriers ----
inline void block_barrier(SourceLine where = SourceLine::current()) { emulator::meet_block(where); }
inline void warp_barrier(SourceLine where = SourceLine::current()) { emulator::meet_warp(where); }

// ---- memory ----
enum class Space { kShared, kGlobal };

inline void check_address(const char* primitive, const void* address, Space space, int alignment,
                          const SourceLine& where) {
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    emulator::fail("misaligned: ", primitive, " at ", emulator::text_of(where), " needs an address that is a multiple",
                   " of ", alignment, ", got one with remainder ", reinterpret_cast<uintptr_t>(address) % alignment);
  if (emulator::is_shared(address) != (space == Space::kShared))
    emulator::fail("wrong memory: ", primitive, " at ", emulator::text_of(where), " got an address in ",
                   space == Space::kShared ? "global" : "shared", " memory");
}

template <class T>
T* shared_array(int byte_offset, int count, SourceLine where = SourceLine::current()) {
  return static_cast<T*>(emulator::shared_buffer(byte_offset, int64_t{count} * static_cast<int64_t>(sizeof(T)), where));
}

template <class V>
V load_shared(const void* from, SourceLine where = SourceLine::current()) {
  check_address("load_shared", from, Space::kShared, sizeof(V), where);
  return *static_cast<const V*>(from);
}
template <class V>
void store_shared(void* to, V value, SourceLine where = SourceLine::current()) {
  check_address("store_shared", to, Space::kShared, sizeof(V), where);
  *static_cast<V*>(to) = value;
}
template <class V>
V load_global(const void* from, SourceLine where = SourceLine::current()) {
  check_address("load_global", from, Space::kGlobal, sizeof(V), where);
  emulator::count_read(from, sizeof(V));
  return *static_cast<const V*>(from);
}
template <class V>
void store_global(void* to, V value, SourceLine where = SourceLine::current()) {
  check_address("store_global", to, Space::kGlobal, sizeof(V), where);
  emulator::count_written(sizeof(V));
  *static_cast<V*>(to) = value;
}

// ---- asynchronous copies: the target is poison from here until the wait that covers the copy ----
inline void copy_async_or_zero(void* shared, const void* global, bool wanted,
                               SourceLine where = SourceLine::current()) {
  check_address("copy_async", shared, Space::kShared, 16, where);
  check_address("copy_async", global, Space::kGlobal, 16, where);
  const uint4 touched = *static_cast<const uint4*>(global);  // an illegal address is found here, not at the wait
  asm volatile("" ::"m"(touched));
  if (wanted) emulator::count_read(global, 16);
  *static_cast<uint4*>(shared) = make_uint4(~0u, ~0u, ~0u, ~0u);
  emulator::issue_copy({shared, global, wanted, where});
}
inline void copy_async(void* shared, const void* global, SourceLine where = SourceLine::current()) {
  copy_async_or_zero(shared, global, true, where);
}
inline void commit_copies() { emulator::commit_group(); }
template <int kPending>
void wait_copies() {
  emulator::Copy copy;
  while (emulator::next_arrived(kPending, copy))
    *static_cast<uint4*>(copy.shared) = copy.wanted ? *static_cast<const uint4*>(copy.global) : make_uint4(0, 0, 0, 0);
}

// ---- exchange in a warp ----
inline float shuffle_xor(float value, int mask, SourceLine where = SourceLine::current()) {
  return std::bit_cast<float>(
      emulator::exchange_lane(std::bit_cast<uint32_t>(value), lane_index() ^ mask, "shuffle_xor", where));
}
inline double shuffle_xor(double value, int mask, SourceLine where = SourceLine::current()) {
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  const auto exchange = [&](uint64_t half) -> uint64_t {
    return emulator::exchange_lane(static_cast<uint32_t>(half), lane_index() ^ mask, "shuffle_xor", where);
  };
  const uint64_t low = exchange(bits), high = exchange(bits >> 32);
  return std::bit_cast<double>(high << 32 | low);
}
inline uint32_t shuffle(uint32_t value, int lane, SourceLine where = SourceLine::current()) {
  return emulator::exchange_lane(value, lane, "shuffle", where);
}
inline float shuffle(float value, int lane, SourceLine where = SourceLine::current()) {
  return std::bit_cast<float>(shuffle(std::bit_cast<uint32_t>(value), lane, where));
}

// Every lane reads its row here, where sanitizers see it.
inline emulator::MatrixRow load_row(const void* row, const char* primitive, const SourceLine& where) {
  check_address(primitive, row, Space::kShared, 16, where);
  return *static_cast<const emulator::MatrixRow*>(row);
}
inline void load_matrices(uint32_t (&d)[4], const void* row, SourceLine where = SourceLine::current()) {
  emulator::distribute_matrices(d, load_row(row, "load_matrices", where), false, where);
}
inline void load_matrices_transposed(uint32_t (&d)[4], const void* row, SourceLine where = SourceLine::current()) {
  emulator::distribute_matrices(d, load_row(row, "load_matrices_transposed", where), true, where);
}

inline void store_matrices_transposed(void* row, const uint32_t (&d)[4], SourceLine where = SourceLine::current()) {
  check_address("store_matrices_transposed", row, Space::kShared, 16, where);
  *static_cast<emulator::MatrixRow*>(row) = emulator::collect_matrix_row(d, where);
}

// ---- matrix products ----
template <class T>
void mma16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SourceLine where = SourceLine::current()) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  constexpr auto kFormat =
      std::is_same_v<T, BFloat16> ? emulator::Product::kBFloat16 : emulator::Product::kFloat16;
  emulator::multiply_fragments(kFormat, false, c, a, b0, b1, where);
}

inline void multiply_tf32(bool from_zero, float (&c)[4], const float (&a)[4], float b0, float b1,
                          const SourceLine& where) {
  const uint32_t bits[4] = {std::bit_cast<uint32_t>(a[0]), std::bit_cast<uint32_t>(a[1]),
                            std::bit_cast<uint32_t>(a[2]), std::bit_cast<uint32_t>(a[3])};
  emulator::multiply_fragments(emulator::Product::kTf32, from_zero, c, bits, std::bit_cast<uint32_t>(b0),
                               std::bit_cast<uint32_t>(b1), where);
}
inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1, SourceLine where = SourceLine::current()) {
  multiply_tf32(false, c, a, b0, b1, where);
}
inline void mma_tf32_from_zero(float (&c)[4], const float (&a)[4], float b0, float b1,
                               SourceLine where = SourceLine::current()) {
  multiply_tf32(true, c, a, b0, b1, where);
}

// ---- number formats ----
inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float exp2_fast(float x) { return emulator::exp2_flushed(x); }
inline float round_tf32(float x) { return emulator::nearest_tf32(x); }

template <class T>
float2 unpack(uint32_t pair) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  const auto low = static_cast<uint16_t>(pair), high = static_cast<uint16_t>(pair >> 16);
  if constexpr (std::is_same_v<T, BFloat16>)
    return make_float2(emulator::float_of_bfloat16(low), emulator::float_of_bfloat16(high));
  else
    return make_float2(emulator::float_of_float16(low), emulator::float_of_float16(high));
}
template <class T>
float2 unpack_again(uint32_t pair) {
  return unpack<T>(pair);
}

template <class T>
uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  if constexpr (std::is_same_v<T, BFloat16>)
    return emulator::bfloat16_of_float(low) | uint32_t{emulator::bfloat16_of_float(high)} << 16;
  else
    return emulator::float16_of_float(low) | uint32_t{emulator::float16_of_float(high)} << 16;
}

}  // namespace rwkv
