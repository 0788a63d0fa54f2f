// Token ids to bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "tokenizer/vocabulary.h"

namespace rwkv {

[[noreturn]] inline void throw_bad_id(const Vocabulary& vocabulary, size_t index, const std::string& id) {
  throw std::invalid_argument(
      "decode: ids[" + std::to_string(index) + "] must be 0 or the id of a token (1 to " +
      std::to_string(vocabulary.last_id()) + "), got " + id + "; mask the other ids before sampling");
}

// The bytes of one id; id 0 ends a document and has none. Throws std::invalid_argument with index and id.
inline std::string_view decode_id(const Vocabulary& vocabulary, int64_t id, size_t index) {
  if (id < 0 || id >= static_cast<int64_t>(kVocabSize)) throw_bad_id(vocabulary, index, std::to_string(id));
  const std::string_view token = vocabulary.token(static_cast<size_t>(id));
  if (token.empty() && id != 0) throw_bad_id(vocabulary, index, std::to_string(id));
  return token;
}

// The bytes of all ids, one after the other.
template <typename Id>
std::string decode(const Vocabulary& vocabulary, const Id* ids, size_t count) {
  size_t size = 0;
  for (size_t i = 0; i < count; ++i) size += decode_id(vocabulary, static_cast<int64_t>(ids[i]), i).size();
  std::string bytes(size, '\0');
  char* end = bytes.data();
  for (size_t i = 0; i < count; ++i) {
    const std::string_view token = vocabulary.token(static_cast<size_t>(ids[i]));
    std::memcpy(end, token.data(), token.size());
    end += token.size();
  }
  return bytes;
}

}  // namespace rwkv
