// The inside of a JSON string without its escapes, 64 bytes at a time.
#pragma once

#include <cstddef>

namespace rwkv {

constexpr size_t kUnescapeRoom = 64;  // bytes that are written behind the last one that counts

// Copies from `at` to `out`, escapes as what they stand for, up to the first quote, control character, half of a
// surrogate pair or broken escape, or to `end`, and returns where that is; `out` moves behind what was copied, which is
// no more than what was read.
using Unescape = const char* (*)(const char* at, const char* end, char*& out);

// Null where this CPU has no code for it: it is the same as escape by escape.
Unescape find_unescape();

}  // namespace rwkv
