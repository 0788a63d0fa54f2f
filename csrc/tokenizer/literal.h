// Python string and bytes literals, as the vocabulary file writes its tokens.
#pragma once

#include <string>
#include <string_view>

namespace rwkv {

// The bytes of 'text', "text" or b'bytes': a str gives its UTF-8 encoding, bytes give themselves. Escapes are
// \n \t \r \\ \' \", \xNN (in a str a code point, in bytes a byte) and, in a str, \uNNNN. Throws
// std::invalid_argument that says what the literal must be.
std::string parse_literal(std::string_view literal);

}  // namespace rwkv
