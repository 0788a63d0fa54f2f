#include "tokenizer/boundaries.h"

#include <algorithm>
#include <string_view>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rwkv {
namespace {

// Eight classes of bytes with like neighbours behind them. Any division is right; this one misses few boundaries
// in text: no token has a letter before a space or a digit, few have a sign before a letter.
uint8_t class_of(uint32_t byte) {
  const auto is_one_of = [&](std::string_view bytes) {
    return byte < 0x80 && bytes.find(static_cast<char>(byte)) != std::string_view::npos;
  };
  if (byte >= 0xC0) return 1 << 0;  // the first byte of a character
  if (byte >= 0x80) return 1 << 1;  // a later one
  if ((byte | 32) >= 'a' && (byte | 32) <= 'z') return 1 << 2;
  if (byte == ' ') return 1 << 3;
  if (is_one_of("\n\r\t")) return 1 << 4;
  if (byte >= '0' && byte <= '9') return 1 << 5;
  if (is_one_of("'-")) return 1 << 6;  // don't, -ci
  return 1 << 7;
}

uint64_t find_generic(const BoundaryTables& tables, const uint8_t* text) {
  uint64_t mask = 0;
  for (uint32_t i = 0; i < 64; ++i) {
    mask |= static_cast<uint64_t>(tables.splits[text[i] | text[i + 1] << 8]) << i;
  }
  return mask;
}

#if defined(__x86_64__)
#define RWKV_AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi")))

// table[bytes[i]] for 64 bytes: two look-ups among 128 entries, of which bit 7 chooses one.
RWKV_AVX512 inline __m512i look_up(const uint8_t (&table)[256], __m512i bytes) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table + 64));
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), bytes, _mm512_loadu_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), low, high);
}

RWKV_AVX512 uint64_t find_avx512(const BoundaryTables& tables, const uint8_t* text) {
  const __m512i before = look_up(tables.before, _mm512_loadu_si512(text));
  const __m512i behind = look_up(tables.behind, _mm512_loadu_si512(text + 1));
  return _mm512_testn_epi8_mask(before, behind);
}
#endif

auto choose_find(bool use_vectors) {
#if defined(__x86_64__)
  if (use_vectors && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw")) return find_avx512;
#endif
  (void)use_vectors;
  return find_generic;
}

}  // namespace

void build_boundaries(const TokenList& tokens, BoundaryTables& tables) {
  std::fill(std::begin(tables.splits), std::end(tables.splits), 1);
  for (uint32_t byte = 0; byte < 256; ++byte) tables.before[byte] = class_of(byte);
  for (size_t id = 1; id < kVocabSize; ++id) {
    const std::string_view token = tokens.token(id);
    for (size_t i = 1; i < token.size(); ++i) {
      const uint8_t a = static_cast<uint8_t>(token[i - 1]);
      const uint8_t b = static_cast<uint8_t>(token[i]);
      tables.splits[a | b << 8] = 0;
      tables.behind[b] |= tables.before[a];
    }
  }
}

Boundaries::Boundaries(const BoundaryTables& tables, bool use_vectors)
    : tables_(&tables), find_(choose_find(use_vectors)) {}

}  // namespace rwkv
