#include "tokenizer/boundaries.h"

#include <algorithm>
#include <string_view>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rwkv {
namespace {

constexpr size_t kClasses = 8 * BoundaryTables::kPlanes;
constexpr size_t kAsciiClasses = 6;

// Any division is right; this one misses few boundaries in text: no token has a letter before a space or a digit, few
// have a sign before a letter.
size_t ascii_class(char byte) {
  const auto is_one_of = [&](std::string_view bytes) { return bytes.find(byte) != std::string_view::npos; };
  if ((byte | 32) >= 'a' && (byte | 32) <= 'z') return 0;
  if (byte == ' ') return 1;
  if (is_one_of("\n\r\t")) return 2;
  if (byte >= '0' && byte <= '9') return 3;
  if (is_one_of("'-")) return 4;  // don't, -ci
  return 5;
}

// Puts bytes above 7F into as many classes as are left. Two that stand before different bytes in tokens lose boundaries
// when they become one: merges, again and again, the two that lose least, judged by how many tokens end and begin so.
class HighClasses {
 public:
  HighClasses(const TokenList& tokens, const BoundaryTables& tables) : ends_(128, 1), begins_(256, 1) {
    for (size_t id = 1; id < kVocabSize; ++id) {
      const std::string_view token = tokens.token(id);
      if (token.empty()) continue;
      if (const auto last = static_cast<uint8_t>(token.back()); last >= 128) ++ends_[last - 128];
      ++begins_[static_cast<uint8_t>(token.front())];
    }
    for (uint32_t a = 0; a < 128; ++a) {
      class_[a] = a;
      for (uint32_t b = 0; b < 256; ++b) joined_[a][b] = tables.splits[(a + 128) | b << 8] ? 0 : ~0u;
    }
    for (uint32_t a = 0; a < 128; ++a) update_costs(a);
    for (size_t classes = 128; classes > kClasses - kAsciiClasses; --classes) merge_cheapest();
  }

  // Classes of bytes 128 .. 255, numbered from kAsciiClasses.
  std::vector<size_t> numbered() const {
    std::vector<size_t> numbers(128), of_byte;
    size_t next = kAsciiClasses;
    for (uint32_t a = 0; a < 128; ++a) {
      if (class_[a] == a) numbers[a] = next++;
      of_byte.push_back(numbers[class_[a]]);  // a class is named for its first byte
    }
    return of_byte;
  }

 private:
  // How many pairs of tokens would no longer be told apart between a's and another byte, if a were in b's class too.
  uint64_t loss(uint32_t a, uint32_t b) const {
    uint32_t lost = 0;
    for (uint32_t c = 0; c < 256; ++c) lost += joined_[b][c] & ~joined_[a][c] & begins_[c];
    return static_cast<uint64_t>(ends_[a]) * lost;
  }

  void update_costs(uint32_t a) {
    for (uint32_t b = 0; b < 128; ++b) {
      if (class_[b] == b) costs_[std::min(a, b)][std::max(a, b)] = loss(a, b) + loss(b, a);
    }
  }

  void merge_cheapest() {
    uint32_t first = 0, second = 0;
    uint64_t least = ~uint64_t{0};
    for (uint32_t a = 0; a < 128; ++a) {
      for (uint32_t b = a + 1; b < 128 && class_[a] == a; ++b) {
        if (class_[b] != b || costs_[a][b] >= least) continue;
        least = costs_[a][b];
        first = a;
        second = b;
      }
    }
    for (uint32_t c = 0; c < 256; ++c) joined_[first][c] |= joined_[second][c];
    ends_[first] += ends_[second];
    std::replace(std::begin(class_), std::end(class_), second, first);
    update_costs(first);
  }

  std::vector<uint32_t> ends_, begins_;  // how many tokens do so with a byte
  uint32_t class_[128];                  // its first byte
  uint32_t joined_[128][256];            // all ones if one of the class stands before the byte in a token
  uint64_t costs_[128][128];             // of merging two classes, the first one's byte being lower
};

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
RWKV_AVX512 inline __m512i look_up(const uint8_t (&table)[256], __m512i bytes, __mmask64 is_high) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table + 64));
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), bytes, _mm512_loadu_si512(table + 192));
  return _mm512_mask_blend_epi8(is_high, low, high);
}

RWKV_AVX512 uint64_t find_avx512(const BoundaryTables& tables, const uint8_t* text) {
  const __m512i a = _mm512_loadu_si512(text), b = _mm512_loadu_si512(text + 1);
  const __mmask64 is_high_a = _mm512_movepi8_mask(a), is_high_b = _mm512_movepi8_mask(b);
  __mmask64 joined =
      _mm512_test_epi8_mask(look_up(tables.before[0], a, is_high_a), look_up(tables.behind[0], b, is_high_b));
  if (is_high_a == 0) return ~joined;
  for (size_t plane = 1; plane < BoundaryTables::kPlanes; ++plane) {
    const uint8_t(&table)[256] = tables.before[plane];
    const __m512i before = _mm512_maskz_permutex2var_epi8(is_high_a, _mm512_loadu_si512(table + 128), a,
                                                          _mm512_loadu_si512(table + 192));
    joined |= _mm512_test_epi8_mask(before, look_up(tables.behind[plane], b, is_high_b));
  }
  return ~joined;
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
  for (size_t id = 1; id < kVocabSize; ++id) {
    const std::string_view token = tokens.token(id);
    for (size_t i = 1; i < token.size(); ++i) {
      tables.splits[static_cast<uint8_t>(token[i - 1]) | static_cast<uint8_t>(token[i]) << 8] = 0;
    }
  }
  const std::vector<size_t> high = HighClasses(tokens, tables).numbered();
  for (uint32_t a = 0; a < 256; ++a) {
    const size_t number = a < 128 ? ascii_class(static_cast<char>(a)) : high[a - 128];
    const auto bit = static_cast<uint8_t>(1 << number % 8);
    tables.before[number / 8][a] = bit;
    for (uint32_t b = 0; b < 256; ++b) {
      if (!tables.splits[a | b << 8]) tables.behind[number / 8][b] |= bit;
    }
  }
}

Boundaries::Boundaries(const BoundaryTables& tables, bool use_vectors)
    : tables_(&tables), find_(choose_find(use_vectors)) {}

}  // namespace rwkv
