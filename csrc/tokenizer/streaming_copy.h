// Copying that leaves the caches to who needs them.
#pragma once

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace rwkv {

// For ids that nobody here reads again soon: they go to memory, which need not be read first, and push nothing out.
inline void streaming_copy(const uint16_t* from, size_t count, uint16_t* to) {
  const uint16_t* const end = from + count;
#if defined(__x86_64__)
  constexpr size_t kLine = 64 / sizeof(uint16_t);
  const size_t to_line = (-reinterpret_cast<uintptr_t>(to) & 63) / sizeof(uint16_t);
  const uint16_t* const first_line = from + std::min(count, to_line);
  to = std::copy(from, first_line, to);
  for (from = first_line; static_cast<size_t>(end - from) >= kLine; from += kLine, to += kLine) {
    const auto* source = reinterpret_cast<const __m128i*>(from);
    for (size_t i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, _mm_loadu_si128(source + i));
  }
  _mm_sfence();  // before another thread is told that they are there
#endif
  std::copy(from, end, to);
}

}  // namespace rwkv
