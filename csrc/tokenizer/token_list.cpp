#include "tokenizer/token_list.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "tokenizer/literal.h"
#include "tokenizer/utf8.h"

namespace rwkv {
namespace {

// The number a field holds, or -1 where it is not a plain decimal number below 10^9.
long read_number(std::string_view field) {
  if (field.empty() || field.size() > 9) return -1;
  long value = 0;
  for (const char c : field) {
    if (c < '0' || c > '9') return -1;
    value = value * 10 + (c - '0');
  }
  return value;
}

// What a message shows of a field, in valid UTF-8 whatever the file holds.
std::string quoted(std::string_view text) {
  std::string shown = "'";
  while (!text.empty() && shown.size() < 60) {
    const Utf8Prefix character = read_utf8(text);
    shown += character.complete ? std::string(text.substr(0, character.length)) : "?";
    text.remove_prefix(character.length);
  }
  return shown + (text.empty() ? "'" : "...'");
}

struct Line {
  size_t id;
  std::string token;
};

Line parse_line(std::string_view line) {
  const size_t first = line.find(' '), last = line.rfind(' ');  // literals hold spaces themselves
  if (first == std::string_view::npos || first == last) {
    throw std::invalid_argument("line must read ID LITERAL LENGTH, got " + quoted(line));
  }
  const long id = read_number(line.substr(0, first)), length = read_number(line.substr(last + 1));
  if (id < 1 || id >= static_cast<long>(kVocabSize)) {
    throw std::invalid_argument("id must be 1 to 65535 (0 ends a document), got " +
                                quoted(line.substr(0, first)));
  }
  const std::string_view literal = line.substr(first + 1, last - first - 1);
  std::string token;
  try {
    token = parse_literal(literal);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(error.what()) + ", got " + quoted(literal));
  }
  if (token.empty() || token.size() > kMaxTokenBytes) {
    throw std::invalid_argument("token must have 1 to 255 bytes, got " + std::to_string(token.size()));
  }
  if (length != static_cast<long>(token.size())) {
    throw std::invalid_argument("length must be " + std::to_string(token.size()) +
                                ", the number of bytes of " + quoted(literal) + ", got " +
                                quoted(line.substr(last + 1)));
  }
  return {static_cast<size_t>(id), std::move(token)};
}

}  // namespace

TokenList TokenList::parse(std::string_view text, const std::string& name) {
  constexpr const char* kAdvice = "; use an intact copy of the vocabulary file";
  std::vector<std::string> tokens(kVocabSize);
  std::unordered_map<std::string, size_t> id_of;
  id_of.reserve(kVocabSize);
  TokenList list;
  for (size_t number = 1; !text.empty(); ++number) {
    const size_t end = text.find('\n');
    std::string_view line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    try {
      auto [id, token] = parse_line(line);
      if (!tokens[id].empty()) throw std::invalid_argument("id must be new, got " + std::to_string(id));
      const auto [other, is_new] = id_of.emplace(token, id);
      if (!is_new) {
        throw std::invalid_argument("token must be new, got that of " + std::to_string(other->second));
      }
      list.last_id_ = std::max(list.last_id_, id);
      tokens[id] = std::move(token);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("vocabulary " + name + ", line " + std::to_string(number) + ": " +
                                  error.what() + kAdvice);
    }
  }
  for (int byte = 0; byte < 256; ++byte) {  // so that every text has an encoding
    if (id_of.count(std::string(1, static_cast<char>(byte))) == 0) {
      throw std::invalid_argument("vocabulary " + name + ": every byte must be a token, got none for " +
                                  std::to_string(byte) + kAdvice);
    }
  }
  list.offsets_.reserve(kVocabSize + 1);
  for (const std::string& token : tokens) {
    list.offsets_.push_back(static_cast<uint32_t>(list.bytes_.size()));
    list.bytes_ += token;
  }
  list.offsets_.push_back(static_cast<uint32_t>(list.bytes_.size()));
  return list;
}

}  // namespace rwkv
