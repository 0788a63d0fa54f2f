#include "data/utf8_check.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tokenizer/utf8.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace rwkv {
namespace {

// The first byte in begin .. end that may not be ASCII: no byte before it is any other.
template <bool kVectors>
const char* skip_ascii(const char* begin, const char* end) {
#if defined(__SSE2__)
  if constexpr (kVectors) {
    for (; end - begin >= 64; begin += 64) {
      const auto load = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(begin) + i); };
      const __m128i any = _mm_or_si128(_mm_or_si128(load(0), load(1)), _mm_or_si128(load(2), load(3)));
      if (_mm_movemask_epi8(any) != 0) break;
    }
  }
#endif
  for (; end - begin >= 8; begin += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, begin, 8);
    if ((bytes & 0x8080808080808080) != 0) break;
  }
  while (begin != end && static_cast<int8_t>(*begin) >= 0) ++begin;
  return begin;
}

template <bool kVectors>
bool check(const char* at, const char* end) {
  for (;;) {
    at = skip_ascii<kVectors>(at, end);
    // Runs of characters of two and three bytes, which are nearly all there are, two comparisons each.
    while (end - at >= 4) {
      uint8_t byte[4];
      std::memcpy(byte, at, 4);
      if (byte[0] >= 0xC2 && byte[0] < 0xE0 && (byte[1] & 0xC0) == 0x80) {
        at += 2;
      } else if ((byte[0] & 0xF0) == 0xE0 && (byte[1] & 0xC0) == 0x80 && (byte[2] & 0xC0) == 0x80 &&
                 (byte[0] != 0xE0 || byte[1] >= 0xA0) && (byte[0] != 0xED || byte[1] < 0xA0)) {
        at += 3;
      } else {
        break;
      }
    }
    if (at == end) return true;
    const Utf8Prefix prefix = read_utf8({at, static_cast<size_t>(end - at)});
    if (!prefix.complete) return false;
    at += prefix.length;
  }
}

}  // namespace

bool is_utf8(std::string_view text, bool use_vectors) {
  const char* end = text.data() + text.size();
  return use_vectors ? check<true>(text.data(), end) : check<false>(text.data(), end);
}

}  // namespace rwkv
