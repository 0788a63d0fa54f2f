// Whether bytes are UTF-8, at the speed of memory for ASCII.
#pragma once

#include <string_view>

namespace rwkv {

// Well-formed as Unicode's table 3-7 defines it: no overlong form, no surrogate, nothing above U+10FFFF, not cut off.
// use_vectors false: plain C++; the answer is the same.
bool is_utf8(std::string_view text, bool use_vectors = true);

}  // namespace rwkv
