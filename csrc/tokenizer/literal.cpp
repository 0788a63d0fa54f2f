#include "tokenizer/literal.h"

#include <cstdint>
#include <stdexcept>

#include "tokenizer/utf8.h"

namespace rwkv {
namespace {

uint32_t read_hex(std::string_view text, size_t position, size_t digits) {
  uint32_t value = 0;
  for (size_t i = position; i < position + digits; ++i) {
    const char c = i < text.size() ? text[i] : '\0';
    const size_t digit = std::string_view("0123456789abcdef").find(c >= 'A' && c <= 'F' ? c - 'A' + 'a' : c);
    if (digit == std::string_view::npos) {
      throw std::invalid_argument("escape must have " + std::to_string(digits) + " hexadecimal digits");
    }
    value = value << 4 | static_cast<uint32_t>(digit);
  }
  return value;
}

// Appends what the escape at text[position] ('\' itself) stands for and returns the position behind it.
size_t read_escape(std::string_view text, size_t position, bool is_bytes, std::string& out) {
  const char kind = position + 1 < text.size() ? text[position + 1] : '\0';
  switch (kind) {
    case 'n': out.push_back('\n'); return position + 2;
    case 't': out.push_back('\t'); return position + 2;
    case 'r': out.push_back('\r'); return position + 2;
    case '\\':
    case '\'':
    case '"': out.push_back(kind); return position + 2;
    case 'x': {
      const uint32_t value = read_hex(text, position + 2, 2);
      if (is_bytes) {
        out.push_back(static_cast<char>(value));
      } else {
        append_utf8(out, value);
      }
      return position + 4;
    }
    case 'u': {
      if (is_bytes) break;
      const uint32_t value = read_hex(text, position + 2, 4);
      if (value >= 0xD800 && value <= 0xDFFF) throw std::invalid_argument("\\u must not be a surrogate");
      append_utf8(out, value);
      return position + 6;
    }
    default: break;
  }
  throw std::invalid_argument("escape must be \\n \\t \\r \\\\ \\' \\\" \\xNN or, outside b'', \\uNNNN");
}

}  // namespace

std::string parse_literal(std::string_view literal) {
  const bool is_bytes = !literal.empty() && literal[0] == 'b';
  std::string_view body = literal.substr(is_bytes ? 1 : 0);
  if (body.size() < 2 || (body[0] != '\'' && body[0] != '"') || body.back() != body[0]) {
    throw std::invalid_argument("token must be a Python literal in quotes");
  }
  const char quote = body[0];
  body = body.substr(1, body.size() - 2);
  std::string out;
  for (size_t i = 0; i < body.size();) {
    if (body[i] == quote) throw std::invalid_argument("quote inside the token must be escaped");
    if (body[i] == '\\') {
      i = read_escape(body, i, is_bytes, out);
      continue;
    }
    const Utf8Prefix character = read_utf8(body.substr(i));
    if (!character.complete) throw std::invalid_argument("text must be UTF-8");
    if (is_bytes && character.length > 1) throw std::invalid_argument("byte above 7F must read \\xNN");
    out.append(body.substr(i, character.length));
    i += character.length;
  }
  return out;
}

}  // namespace rwkv
