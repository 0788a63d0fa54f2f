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

size_t find_generic(const BoundaryTables& tables, const uint8_t* text, size_t size, uint16_t* ends) {
  size_t count = 0;
  for (size_t i = 0; i < size; ++i) {
    ends[count] = static_cast<uint16_t>(i + 1);  // stays if a token must end here, else the next one replaces it
    count += tables.splits[text[i] | text[i + 1] << 8];
  }
  return count;
}

#if defined(__x86_64__)
#define RWKV_AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vbmi2,popcnt")))

constexpr size_t kBlock = 64;       // bytes whose boundaries are found at once
constexpr size_t kFetched = 4608;  // bytes ahead: more than are encoded before the next ones are searched

struct Numbers {
  uint8_t byte[kBlock];
};
constexpr Numbers make_numbers() {
  Numbers numbers{};
  for (uint8_t i = 0; i < kBlock; ++i) numbers.byte[i] = static_cast<uint8_t>(i + 1);
  return numbers;
}
constexpr Numbers kNumbers = make_numbers();

// table[bytes[i]] for 64 bytes: two look-ups among 128 entries, of which bit 7 chooses one.
RWKV_AVX512 inline __m512i look_up(const uint8_t (&table)[256], __m512i bytes, __mmask64 is_high) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table + 64));
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), bytes, _mm512_loadu_si512(table + 192));
  return _mm512_mask_blend_epi8(is_high, low, high);
}

// The same where the byte is above 7F, else 0.
RWKV_AVX512 inline __m512i look_up_high(const uint8_t (&table)[256], __m512i bytes, __mmask64 is_high) {
  return _mm512_maskz_permutex2var_epi8(is_high, _mm512_loadu_si512(table + 128), bytes,
                                        _mm512_loadu_si512(table + 192));
}

// Bit i is set if a character of three bytes starts at text[i] behind which a token must end.
RWKV_AVX512 inline __mmask64 find_alone(const BoundaryTables& tables, const uint8_t* text, __m512i first,
                                        __mmask64 is_high) {
  const __m512i alone = look_up_high(tables.alone, first, is_high);
  __mmask64 found = _mm512_test_epi8_mask(alone, alone);
  if (found == 0) return found;  // most languages have none
  const __m512i above_continuation = _mm512_set1_epi8(static_cast<char>(0xC0));  // signed: 80 .. BF are below it
  found = _mm512_mask_cmplt_epi8_mask(found, _mm512_loadu_si512(text + 1), above_continuation);
  found = _mm512_mask_cmplt_epi8_mask(found, _mm512_loadu_si512(text + 2), above_continuation);
  return _mm512_mask_cmpge_epi8_mask(found, _mm512_loadu_si512(text + 3), above_continuation);
}

RWKV_AVX512 size_t find_avx512(const BoundaryTables& tables, const uint8_t* text, size_t size, uint16_t* ends) {
  const __m512i numbers = _mm512_loadu_si512(kNumbers.byte);
  size_t count = 0;
  uint64_t carried = 0;  // of the next block's first bytes
  for (size_t block = 0; block < size; block += kBlock) {
    // The text is read once: not to the caches that keep the memo. Beyond its end a prefetch does nothing.
    _mm_prefetch(text + block + kFetched, _MM_HINT_NTA);
    const __m512i a = _mm512_loadu_si512(text + block), b = _mm512_loadu_si512(text + block + 1);
    const __mmask64 is_high_a = _mm512_movepi8_mask(a), is_high_b = _mm512_movepi8_mask(b);
    __m512i joined = _mm512_and_si512(look_up(tables.before[0], a, is_high_a), look_up(tables.behind[0], b, is_high_b));
    uint64_t must_end = carried;
    carried = 0;
    if (is_high_a != 0) {
      for (size_t plane = 1; plane < BoundaryTables::kPlanes; ++plane) {
        const __m512i before = look_up_high(tables.before[plane], a, is_high_a);
        const __m512i behind = look_up(tables.behind[plane], b, is_high_b);
        joined = _mm512_or_si512(joined, _mm512_and_si512(before, behind));
      }
      const __mmask64 alone = find_alone(tables, text + block, a, is_high_a);
      must_end |= alone << 2;
      carried = alone >> (kBlock - 2);
    }
    must_end |= _mm512_testn_epi8_mask(joined, joined);
    if (size - block < kBlock) must_end &= (uint64_t{1} << (size - block)) - 1;

    // The numbers of the bits that are set, side by side, as positions in the text.
    const __m512i set = _mm512_maskz_compress_epi8(must_end, numbers);
    const __m512i begin = _mm512_set1_epi16(static_cast<int16_t>(block));
    const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(set));
    const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(set, 1));
    _mm512_storeu_si512(ends + count, _mm512_add_epi16(low, begin));
    _mm512_storeu_si512(ends + count + kBlock / 2, _mm512_add_epi16(high, begin));
    count += static_cast<size_t>(__builtin_popcountll(must_end));
  }
  return count;
}
#endif

auto choose_find(bool use_vectors) {
#if defined(__x86_64__)
  if (use_vectors && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512bw")) {
    return find_avx512;
  }
#endif
  (void)use_vectors;
  return find_generic;
}

void find_alone(const TokenList& tokens, BoundaryTables& tables) {
  const auto continues = [](char byte) { return (byte & 0xC0) == 0x80; };
  std::fill(tables.alone + 0xE0, tables.alone + 0xF0, 1);
  for (size_t id = 1; id < kVocabSize; ++id) {
    const std::string_view token = tokens.token(id);
    for (size_t i = 1; i < token.size(); ++i) {
      // Whether token[i - 1] can be the last byte of such a character, of which the token may have one, two or three.
      if (continues(token[i]) || !continues(token[i - 1]) || (i >= 2 && !continues(token[i - 2]))) continue;
      if (i >= 3) {
        tables.alone[static_cast<uint8_t>(token[i - 3])] = 0;
      } else {
        std::fill(std::begin(tables.alone), std::end(tables.alone), 0);
      }
    }
  }
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
  find_alone(tokens, tables);
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
