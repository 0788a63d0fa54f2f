#include "data/utf8_check.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tokenizer/utf8.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rwkv {
namespace {

// Behind a run of ASCII bytes; stops before one that is another, never behind it.
const char* skip_ascii(const char* begin, const char* end) {
  for (; end - begin >= 8; begin += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, begin, 8);
    if ((bytes & 0x8080808080808080) != 0) break;
  }
  while (begin != end && static_cast<int8_t>(*begin) >= 0) ++begin;
  return begin;
}

bool check_generic(std::string_view text) {
  const char* at = text.data();
  const char* end = at + text.size();
  for (;;) {
    at = skip_ascii(at, end);
    // Runs of characters of two and three bytes, which are nearly all there are.
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

#if defined(__x86_64__)
#define RWKV_AVX2 __attribute__((target("avx2")))

// What may be wrong with two bytes side by side, a bit each: it is if the bit is set in all three tables, which the
// high and the low half of the first byte and the high half of the second index. Keiser and Lemire, "Validating UTF-8
// In Less Than One Instruction Per Byte", 2021.
constexpr int kTooShort = 1;         // a first byte, then none that continues it
constexpr int kTooLong = 2;          // ASCII, then a byte that continues something
constexpr int kOverlong3 = 4;        // E0, then 80 .. 9F
constexpr int kTooLarge = 8;         // F4, then 90 .. BF; F5 and above
constexpr int kSurrogate = 16;       // ED, then A0 .. BF
constexpr int kOverlong2 = 32;       // C0 or C1
constexpr int kOverlong4 = 64;       // F0, then 80 .. 8F; F5 and above with that
constexpr int kTwoContinuations = 128;  // right where the character has three bytes or four
constexpr int kAnyLow = kTooShort | kTooLong | kTwoContinuations;
constexpr int kAboveF4 = kAnyLow | kTooLarge | kOverlong4;
constexpr int kContinuation = kTooLong | kOverlong2 | kTwoContinuations;

struct Halves {
  uint8_t entry[16];
};
constexpr Halves kFirstHigh = {{kTooLong, kTooLong, kTooLong, kTooLong, kTooLong, kTooLong, kTooLong, kTooLong,
                                kTwoContinuations, kTwoContinuations, kTwoContinuations, kTwoContinuations,
                                kTooShort | kOverlong2, kTooShort, kTooShort | kOverlong3 | kSurrogate,
                                kTooShort | kTooLarge | kOverlong4}};
constexpr Halves kFirstLow = {{kAnyLow | kOverlong2 | kOverlong3 | kOverlong4, kAnyLow | kOverlong2, kAnyLow, kAnyLow,
                               kAnyLow | kTooLarge, kAboveF4, kAboveF4, kAboveF4, kAboveF4, kAboveF4, kAboveF4,
                               kAboveF4, kAboveF4, kAboveF4 | kSurrogate, kAboveF4, kAboveF4}};
constexpr Halves kSecondHigh = {{kTooShort, kTooShort, kTooShort, kTooShort, kTooShort, kTooShort, kTooShort, kTooShort,
                                 kContinuation | kOverlong3 | kOverlong4, kContinuation | kOverlong3 | kTooLarge,
                                 kContinuation | kSurrogate | kTooLarge, kContinuation | kSurrogate | kTooLarge,
                                 kTooShort, kTooShort, kTooShort, kTooShort}};

RWKV_AVX2 inline __m256i look_up(const Halves& table, __m256i halves) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.entry));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half), halves);
}

// Not zero if a character is wrong that ends in `bytes` or is cut off by them; `before` are the 32 bytes before.
RWKV_AVX2 inline __m256i find_errors(__m256i before, __m256i bytes) {
  const __m256i middle = _mm256_permute2x128_si256(before, bytes, 0x21);
  const __m256i first = _mm256_alignr_epi8(bytes, middle, 15);  // each byte's predecessor
  const __m256i low = _mm256_set1_epi8(0x0F);
  const __m256i wrong_pair = _mm256_and_si256(
      _mm256_and_si256(look_up(kFirstHigh, _mm256_and_si256(_mm256_srli_epi16(first, 4), low)),
                       look_up(kFirstLow, _mm256_and_si256(first, low))),
      look_up(kSecondHigh, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low)));
  // Two places behind E0 and above, three behind F0 and above, a continuation must follow another.
  const __m256i second_back = _mm256_alignr_epi8(bytes, middle, 14);
  const __m256i third_back = _mm256_alignr_epi8(bytes, middle, 13);
  const __m256i must_continue = _mm256_or_si256(_mm256_subs_epu8(second_back, _mm256_set1_epi8(0xE0 - 0x80)),
                                                _mm256_subs_epu8(third_back, _mm256_set1_epi8(0xF0 - 0x80)));
  const __m256i top = _mm256_set1_epi8(static_cast<char>(kTwoContinuations));
  return _mm256_xor_si256(_mm256_and_si256(must_continue, top), wrong_pair);
}

RWKV_AVX2 bool check_avx2(std::string_view text) {
  constexpr size_t kBlock = 32, kBlocks = 4 * kBlock;
  __m256i before = _mm256_setzero_si256(), errors = before;
  const auto load = [&](size_t at) RWKV_AVX2 {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text.data() + at));
  };
  const auto check = [&](__m256i bytes) RWKV_AVX2 {
    errors = _mm256_or_si256(errors, find_errors(before, bytes));
    before = bytes;
  };
  size_t at = 0;
  for (; text.size() - at >= kBlocks; at += kBlocks) {
    const __m256i a = load(at), b = load(at + kBlock), c = load(at + 2 * kBlock), d = load(at + 3 * kBlock);
    const __m256i any = _mm256_or_si256(_mm256_or_si256(before, a), _mm256_or_si256(_mm256_or_si256(b, c), d));
    if (_mm256_movemask_epi8(any) == 0) {  // ASCII
      before = d;
      continue;
    }
    check(a);
    check(b);
    check(c);
    check(d);
  }
  for (; text.size() - at >= kBlock; at += kBlock) check(load(at));
  uint8_t rest[kBlock] = {};  // with the zeros behind the text, which end what it may have left open
  std::memcpy(rest, text.data() + at, text.size() - at);
  check(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rest)));
  return _mm256_testz_si256(errors, errors) != 0;
}
#endif

}  // namespace

bool is_utf8(std::string_view text, bool use_vectors) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (use_vectors && has_avx2) return check_avx2(text);
#endif
  (void)use_vectors;
  return check_generic(text);
}

}  // namespace rwkv
