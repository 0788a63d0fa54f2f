// The inner loop for x86-64 processors with SSE4.2.
#if defined(__x86_64__)
#include <nmmintrin.h>

#include <cstring>

#include "tokenizer/segment_loop.h"

// From here on. What others may use as well, such as longest_match(), came before it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("sse4.2"))), apply_to = function)
#else
#pragma GCC target("sse4.2")
#endif

namespace rwkv {
namespace {

struct Block {
  __m128i bytes;

  static Block load(const void* from) { return {_mm_loadu_si128(static_cast<const __m128i*>(from))}; }
  void store(void* to) const { _mm_storeu_si128(static_cast<__m128i*>(to), bytes); }

  uint64_t hash(uint64_t seed) const {
    seed = _mm_crc32_u64(seed, static_cast<uint64_t>(_mm_cvtsi128_si64(bytes)));
    return _mm_crc32_u64(seed, static_cast<uint64_t>(_mm_extract_epi64(bytes, 1)));
  }

  Block difference(Block other) const { return {_mm_xor_si128(bytes, other.bytes)}; }
  Block meet(Block other) const { return {_mm_and_si128(bytes, other.bytes)}; }
  Block join(Block other) const { return {_mm_or_si128(bytes, other.bytes)}; }
  bool is_zero() const { return _mm_testz_si128(bytes, bytes) != 0; }
};

}  // namespace
}  // namespace rwkv

#include "tokenizer/segment_loop_instance.h"

namespace rwkv {

uint16_t* encode_segments_sse42(const MatchCell* cells, SegmentMemo& memo, const Segments& segments, uint16_t* out) {
  return encode_segments(cells, memo, segments, out);
}

}  // namespace rwkv

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
