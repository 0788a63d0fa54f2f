#include "data/json_record.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "data/json_unescape.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace rwkv {
namespace {

constexpr size_t kVector = 16;
constexpr ptrdiff_t kStretch = 1 << 16;  // bytes of a string that are unescaped before there must be more room
constexpr size_t kBehind = std::max(kVector, kUnescapeRoom);  // bytes that may be written behind the last one
constexpr int kMaxDepth = 64;
constexpr ptrdiff_t kMaxNumber = 600;  // characters: below the least limit of digits that Python can be told

bool is_special(char byte) { return byte == '"' || byte == '\\' || static_cast<uint8_t>(byte) < 0x20; }

#if defined(__SSE2__)
// Bit i is set if byte i ends a run of plain characters: a quote, a backslash or a control character.
uint32_t special_bytes(__m128i bytes) {
  const __m128i quote = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('"'));
  const __m128i backslash = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\'));
  const __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(bytes, _mm_set1_epi8(0x1F)), bytes);
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(quote, backslash), control)));
}
#endif

// The first special byte in begin .. end, or end.
template <bool kVectors>
const char* find_special(const char* begin, const char* end) {
#if defined(__SSE2__)
  if constexpr (kVectors) {
    for (; end - begin >= static_cast<ptrdiff_t>(kVector); begin += kVector) {
      const uint32_t mask = special_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(begin)));
      if (mask != 0) return begin + __builtin_ctz(mask);
    }
  }
#endif
  while (begin != end && !is_special(*begin)) ++begin;
  return begin;
}

// The same, and copies what lies before it to `out`, where there is room for kVector bytes more than that.
template <bool kVectors>
const char* copy_to_special(const char* begin, const char* end, char*& out) {
#if defined(__SSE2__)
  if constexpr (kVectors) {
    for (; end - begin >= static_cast<ptrdiff_t>(kVector); begin += kVector, out += kVector) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(begin));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
      const uint32_t mask = special_bytes(bytes);
      if (mask != 0) {
        const int count = __builtin_ctz(mask);
        out += count;
        return begin + count;
      }
    }
  }
#endif
  while (begin != end && !is_special(*begin)) *out++ = *begin++;
  return begin;
}

struct HexDigits {
  uint32_t value[256];
};

// 0 to 15, or a number above 0xFFFF for what is no hexadecimal digit.
constexpr HexDigits make_hex_digits() {
  HexDigits digits{};
  for (uint32_t& value : digits.value) value = 0x10000;
  for (uint32_t i = 0; i < 10; ++i) digits.value['0' + i] = i;
  for (uint32_t i = 0; i < 6; ++i) digits.value['a' + i] = digits.value['A' + i] = 10 + i;
  return digits;
}
constexpr HexDigits kHexDigits = make_hex_digits();

// The code unit of `XXXX` at digits[0 .. 4), or a number above 0xFFFF.
uint32_t code_unit(const char* digits) {
  const auto value = [&](int i) { return kHexDigits.value[static_cast<uint8_t>(digits[i])]; };
  return value(0) << 12 | value(1) << 8 | value(2) << 4 | value(3);
}

// Writes four bytes, of which the character may have fewer.
void put_utf8(uint32_t code_point, char*& out) {
  const auto put = [&](uint32_t a, uint32_t b, uint32_t c, uint32_t d, int length) {
    const uint8_t bytes[4] = {static_cast<uint8_t>(a), static_cast<uint8_t>(b), static_cast<uint8_t>(c),
                              static_cast<uint8_t>(d)};
    std::memcpy(out, bytes, 4);
    out += length;
  };
  const auto continuation = [&](int shift) { return 0x80 | (code_point >> shift & 0x3F); };
  if (code_point < 0x80) return put(code_point, 0, 0, 0, 1);
  if (code_point < 0x800) return put(0xC0 | code_point >> 6, continuation(0), 0, 0, 2);
  if (code_point < 0x10000) return put(0xE0 | code_point >> 12, continuation(6), continuation(0), 0, 3);
  put(0xF0 | code_point >> 18, continuation(12), continuation(6), continuation(0), 4);
}

// What a backslash and this byte stand for; 0 for what is no such escape.
char short_escape(char byte) {
  switch (byte) {
    case '"': case '\\': case '/': return byte;
    case 'b': return '\b';
    case 'f': return '\f';
    case 'n': return '\n';
    case 'r': return '\r';
    case 't': return '\t';
    default: return 0;
  }
}

// Walks over a line; every function moves `at` behind what it reads and returns false where that is not there. None
// passes a line end: it is neither space nor a part of a string.
template <bool kVectors>
struct Walk {
  const char* at;
  const char* end;
  Unescape unescape;  // or null
  GrowingBytes& key_scratch;
  GrowingBytes& text_scratch;

  bool next_is(char byte) {
    if (at == end || *at != byte) return false;
    ++at;
    return true;
  }

  void skip_space() {
    while (at != end && (*at == ' ' || *at == '\t' || *at == '\r')) ++at;
  }

  bool skip_literal(std::string_view literal) {
    if (static_cast<size_t>(end - at) < literal.size()) return false;
    if (std::memcmp(at, literal.data(), literal.size()) != 0) return false;
    at += literal.size();
    return true;
  }

  bool skip_digits() {
    const char* first = at;
    while (at != end && *at >= '0' && *at <= '9') ++at;
    return at != first;
  }

  bool skip_number() {
    const char* first = at;
    next_is('-');
    if (!next_is('0') && !skip_digits()) return false;
    if (next_is('.') && !skip_digits()) return false;
    if (at != end && (*at | 32) == 'e') {
      ++at;
      if (!next_is('+')) next_is('-');
      if (!skip_digits()) return false;
    }
    return at - first <= kMaxNumber;
  }

  // Behind the opening quote.
  bool skip_string() {
    at = find_special<kVectors>(at, end);
    for (;;) {
      if (next_is('"')) return true;
      if (!next_is('\\') || at == end) return false;
      const char escape = *at++;
      if (short_escape(escape) == 0) {
        if (escape != 'u' || end - at < 4 || code_unit(at) > 0xFFFF) return false;
        at += 4;
      }
      if (unescape) {  // many escapes at once, though nobody reads what they stand for
        const char* const stop = stretch_end();
        char* out = key_scratch.room(0, static_cast<size_t>(stop - at) + kBehind);
        at = unescape(at, stop, out);
      }
      at = find_special<kVectors>(at, end);
    }
  }

  const char* stretch_end() const { return at + std::min(end - at, kStretch); }

  // Behind `\u`; reads every `\uXXXX` that follows before `stop` as well.
  bool read_code_points(const char* stop, char*& out) {
    do {
      if (!read_code_point(out)) return false;
    } while (stop - at >= 2 && at[0] == '\\' && at[1] == 'u' && (at += 2));
    return true;
  }

  bool read_code_point(char*& out) {
    if (end - at < 4) return false;
    uint32_t code_point = code_unit(at);
    at += 4;
    if (code_point > 0xFFFF) return false;
    if (code_point >= 0xD800 && code_point < 0xE000) {
      if (code_point >= 0xDC00 || end - at < 6 || at[0] != '\\' || at[1] != 'u') return false;
      const uint32_t low = code_unit(at + 2);
      if (low < 0xDC00 || low > 0xDFFF) return false;
      code_point = 0x10000 + ((code_point - 0xD800) << 10) + (low - 0xDC00);
      at += 6;
    }
    put_utf8(code_point, out);
    return true;
  }

  // Behind the opening quote. The string stays where it is unless it has an escape.
  bool read_string(GrowingBytes& scratch, std::string_view& string) {
    const char* first = at;
    at = find_special<kVectors>(at, end);
    if (next_is('"')) {
      string = {first, static_cast<size_t>(at - 1 - first)};
      return true;
    }
    auto size = static_cast<size_t>(at - first);
    std::memcpy(scratch.room(0, size + kBehind), first, size);
    for (;;) {
      const char* const stop = stretch_end();
      char* const begin = scratch.room(size, static_cast<size_t>(stop - at) + kBehind);
      char* out = begin;
      at = unescape ? unescape(at, stop, out) : copy_to_special<kVectors>(at, stop, out);
      const bool is_cut = at == stop && stop != end;
      if (next_is('\\')) {
        if (at == end) return false;
        const char escape = *at++;
        if (const char byte = short_escape(escape)) {
          *out++ = byte;
        } else if (escape != 'u' || !read_code_points(stop, out)) {
          return false;
        }
      } else if (!is_cut) {
        string = {scratch.data(), size + static_cast<size_t>(out - begin)};
        return next_is('"');
      }
      size += static_cast<size_t>(out - begin);
    }
  }

  // Reads `, ` or the closing bracket; `more` says which.
  bool next_member(char closing, bool& more) {
    skip_space();
    more = next_is(',');
    skip_space();
    return more || next_is(closing);
  }

  bool skip_colon() {
    skip_space();
    if (!next_is(':')) return false;
    skip_space();
    return true;
  }

  bool skip_object(int depth) {
    skip_space();
    if (next_is('}')) return true;
    for (bool more = true; more;) {
      if (!next_is('"') || !skip_string() || !skip_colon() || !skip_value(depth)) return false;
      if (!next_member('}', more)) return false;
    }
    return true;
  }

  bool skip_array(int depth) {
    skip_space();
    if (next_is(']')) return true;
    for (bool more = true; more;) {
      if (!skip_value(depth) || !next_member(']', more)) return false;
    }
    return true;
  }

  bool skip_value(int depth) {
    if (at == end) return false;
    switch (*at) {
      case '"': ++at; return skip_string();
      case '{': ++at; return depth > 0 && skip_object(depth - 1);
      case '[': ++at; return depth > 0 && skip_array(depth - 1);
      case 't': return skip_literal("true");
      case 'f': return skip_literal("false");
      case 'n': return skip_literal("null");
      default: return skip_number();
    }
  }

  bool read_record(std::string_view wanted, std::string_view& text) {
    skip_space();
    if (!next_is('{')) return false;
    skip_space();
    bool found = false;
    for (bool more = true; more;) {
      std::string_view key;
      if (!next_is('"') || !read_string(key_scratch, key) || !skip_colon()) return false;
      if (key != wanted) {
        if (!skip_value(kMaxDepth - 1)) return false;
      } else {
        found = next_is('"');  // a later value takes the place of an earlier one
        if (!(found ? read_string(text_scratch, text) : skip_value(kMaxDepth - 1))) return false;
      }
      if (!next_member('}', more)) return false;
    }
    skip_space();
    return found && (at == end || *at == '\n');
  }
};

}  // namespace

bool JsonRecord::read(std::string_view& lines, std::string_view key, std::string_view& text) {
  const char* const end = lines.data() + lines.size();
  const auto read_with = [&](auto walk) {
    if (!walk.read_record(key, text)) return false;
    lines.remove_prefix(static_cast<size_t>(walk.at - lines.data()));
    return true;
  };
  return use_vectors_ ? read_with(Walk<true>{lines.data(), end, find_unescape(), key_, text_})
                      : read_with(Walk<false>{lines.data(), end, nullptr, key_, text_});
}

}  // namespace rwkv
