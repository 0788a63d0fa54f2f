// UTF-8 at the level of bytes: well-formedness as Unicode's table 3-7 defines it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace rwkv {

struct Utf8Prefix {
  size_t length;  // bytes that belong together: the whole character, or the longest start of one (at least 1)
  bool complete;  // those bytes are one well-formed character
  bool possible;  // not complete, but the text ended before the character could: more bytes may complete it
};

// Reads one character, or one maximal broken piece of one, from the front of a text that is not empty.
Utf8Prefix read_utf8(std::string_view text);

// The number of bytes at the end of `text` that start a character which further bytes may complete: 0 to 3.
size_t incomplete_tail(std::string_view text);

void append_utf8(std::string& text, uint32_t code_point);

}  // namespace rwkv
