#include "data/json_unescape.h"

#include <cstdint>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rwkv {

#if defined(__x86_64__)
namespace {

#define RWKV_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vbmi2,bmi,popcnt")))

constexpr uint64_t kLast = uint64_t{1} << 63;
constexpr uint64_t kLastFive = uint64_t{0x1F} << 59;

struct Table {
  uint8_t entry[128];
};

// What a backslash and this byte stand for; 0 for what is no such escape.
constexpr Table make_short_escapes() {
  Table table{};
  for (const char byte : {'"', '\\', '/'}) table.entry[static_cast<uint8_t>(byte)] = static_cast<uint8_t>(byte);
  table.entry['b'] = '\b';
  table.entry['f'] = '\f';
  table.entry['n'] = '\n';
  table.entry['r'] = '\r';
  table.entry['t'] = '\t';
  return table;
}

// Of hexadecimal digits; 0x80 for what is none.
constexpr Table make_digits() {
  Table table{};
  for (uint8_t& value : table.entry) value = 0x80;
  for (uint8_t i = 0; i < 10; ++i) table.entry['0' + i] = i;
  for (uint8_t i = 0; i < 6; ++i) table.entry['a' + i] = table.entry['A' + i] = static_cast<uint8_t>(10 + i);
  return table;
}

// Of the byte behind each.
constexpr Table make_following() {
  Table table{};
  for (uint8_t i = 0; i < 64; ++i) table.entry[i] = static_cast<uint8_t>(i + 1);
  return table;
}

constexpr Table kShortEscapes = make_short_escapes();
constexpr Table kDigits = make_digits();
constexpr Table kFollowing = make_following();

// By the low seven bits of each byte.
RWKV_VBMI2 inline __m512i look_up(const Table& table, __m512i bytes) {
  return _mm512_permutex2var_epi8(_mm512_loadu_si512(table.entry), bytes, _mm512_loadu_si512(table.entry + 64));
}

RWKV_VBMI2 inline __m512i all(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }

// The first, third, .. backslash of every run.
inline uint64_t every_other(uint64_t backslashes) {
  uint64_t firsts = 0;
  while (backslashes != 0) {
    const uint64_t first = backslashes & -backslashes;
    firsts |= first;
    backslashes &= ~(first | first << 1);
  }
  return firsts;
}

// The bits below the lowest one of a mask: all if there is none.
inline uint64_t below(uint64_t mask) { return (mask & -mask) - 1; }

// A block of 64 bytes at a time; bit i of every mask is byte i. Each begins where no escape is open. What an escape
// stands for is made in its place, and at the end all is left out at once that does not count.
RWKV_VBMI2 const char* unescape(const char* at, const char* end, char*& to) {
  char* out = to;
  const auto put = [&out](uint64_t kept, __m512i bytes) RWKV_VBMI2 {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(kept, bytes));
    out += __builtin_popcountll(kept);
  };
  for (;;) {
    __builtin_prefetch(at + 1024);  // where the processor itself would stop at the page's end
    const auto rest = static_cast<uint64_t>(end - at);
    const __m512i bytes =  // zeros behind the end, which are control characters
        rest >= 64 ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8((uint64_t{1} << rest) - 1, at);
    const uint64_t is_high = _mm512_movepi8_mask(bytes);
    const uint64_t backslashes = _mm512_cmpeq_epi8_mask(bytes, all('\\'));
    const uint64_t escapes = backslashes & backslashes << 1 ? every_other(backslashes) : backslashes;
    const __m512i replaced = look_up(kShortEscapes, bytes);
    const uint64_t is_short = _mm512_test_epi8_mask(replaced, replaced) & ~is_high;
    const uint64_t is_u = _mm512_cmpeq_epi8_mask(bytes, all('u'));
    const uint64_t unicode = escapes & is_u >> 1;
    uint64_t ends = _mm512_cmplt_epu8_mask(bytes, all(0x20)) | (escapes & ~((is_short | is_u) >> 1));
    ends |= _mm512_cmpeq_epi8_mask(bytes, all('"')) & ~(escapes << 1);
    uint64_t cut = escapes & kLast;  // goes on behind the block
    uint64_t left_out = escapes;
    __m512i made = _mm512_mask_mov_epi8(bytes, escapes << 1, replaced);
    if ((unicode | ends | cut) == 0) {  // a branch, so that the next block need not wait for these masks
      put(~escapes, made);
      at += 64;
      continue;
    }
    if (unicode != 0) {
      const __m512i digit = look_up(kDigits, bytes);
      const __m512i next = _mm512_maskz_permutexvar_epi8(~kLast, _mm512_loadu_si512(kFollowing.entry), digit);
      const uint64_t is_wrong = _mm512_movepi8_mask(digit) | is_high;
      const uint64_t is_zero = _mm512_testn_epi8_mask(digit, digit);
      const uint64_t is_d = _mm512_cmpeq_epi8_mask(digit, all(0xD));
      const uint64_t below_8 = _mm512_cmplt_epu8_mask(digit, all(8));
      cut |= unicode & kLastFive;
      ends |= unicode & (is_wrong >> 2 | is_wrong >> 3 | is_wrong >> 4 | is_wrong >> 5);
      ends |= unicode & is_d >> 2 & ~(below_8 >> 3);  // D800 .. DFFF
      const uint64_t two_or_one = unicode & is_zero >> 2 & below_8 >> 3;  // bytes: up to 07FF
      const uint64_t one = two_or_one & is_zero >> 3 & below_8 >> 4;
      left_out |= unicode << 1 | two_or_one << 2 | one << 3 | unicode << 5;
      // Up to three bytes take the places of the first three digits: 1110 aaaa, 10 bbbbcc, 10 ccdddd.
      const __m512i bc = _mm512_or_si512(_mm512_slli_epi16(digit, 2),
                                         _mm512_and_si512(_mm512_srli_epi16(next, 2), all(3)));
      const __m512i cd = _mm512_or_si512(_mm512_slli_epi16(digit, 4), next);
      const __m512i continuation = _mm512_or_si512(_mm512_and_si512(cd, all(0x3F)), all(0x80));
      made = _mm512_mask_mov_epi8(made, unicode << 2, _mm512_or_si512(digit, all(0xE0)));
      made = _mm512_mask_mov_epi8(made, unicode << 3, _mm512_or_si512(bc, all(0x80)));
      made = _mm512_mask_mov_epi8(made, two_or_one << 3, _mm512_or_si512(bc, all(0xC0)));
      made = _mm512_mask_mov_epi8(made, unicode << 4, continuation);
      made = _mm512_mask_mov_epi8(made, one << 4, cd);
    }
    const uint64_t whole = below(cut);
    ends &= whole;
    if (ends != 0) {
      put(below(ends) & ~left_out, made);
      to = out;
      return at + _tzcnt_u64(ends);
    }
    put(whole & ~left_out, made);
    at += _tzcnt_u64(cut);  // 64 if there is none
  }
}

}  // namespace
#endif

Unescape find_unescape() {
#if defined(__x86_64__)
  static const bool is_supported = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi") &&
                                   __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi");
  if (is_supported) return unescape;
#endif
  return nullptr;
}

}  // namespace rwkv
