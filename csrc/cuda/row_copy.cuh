// Rows of a segment, one per token, on their way from global to shared memory.
#pragma once

#include "cuda/device_primitives.h"
#include "cuda/static_for.h"

namespace rwkv {

// Starts copying rows first .. first + kRows - 1 of a segment of that many tokens, kSize elements each, 16 bytes a
// thread; from is the segment's row 0, stride in elements, pitch in bytes. Rows past the end become 0. The caller
// commits and waits.
template <int kSize, int kRows, int kThreads, class E>
__device__ __forceinline__ void copy_rows(char* to, int pitch, const E* from, int64_t stride, int64_t first,
                                          int64_t tokens) {
  constexpr int kPieces = kSize * static_cast<int>(sizeof(E)) / 16;  // of a row
  constexpr int kRowsAtOnce = kThreads / kPieces;
  static_assert(kRows % kRowsAtOnce == 0 && kThreads % kPieces == 0);
  const int row = thread_index() / kPieces, piece = thread_index() % kPieces;
  const char* source = reinterpret_cast<const char*>(from + (first + row) * stride) + 16 * piece;
  char* target = to + row * pitch + 16 * piece;
  const int64_t step = kRowsAtOnce * stride * static_cast<int64_t>(sizeof(E));
  if (first + kRows <= tokens) {
    static_for<0, kRows / kRowsAtOnce>([&](auto n) {
      copy_async(target + n.value * kRowsAtOnce * pitch, source);
      source += step;
    });
  } else {
#pragma unroll 1
    for (int n = 0; n < kRows / kRowsAtOnce; ++n) {
      const bool wanted = first + row + n * kRowsAtOnce < tokens;
      copy_async_or_zero(target + n * kRowsAtOnce * pitch, wanted ? source : reinterpret_cast<const char*>(from),
                         wanted);
      source += step;
    }
  }
}

}  // namespace rwkv
