// Token ids to bytes, whole or one id at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "tokenizer/utf8.h"
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

// Cuts a growing byte string at ends of characters. A token may hold half a character; bytes that cannot
// become part of one come out at once (a decoder replaces them), so the stream never stalls on a broken byte
// or on a genuine U+FFFD.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  // Adds one id and returns the bytes up to the last point where no character is left open.
  std::string push(int64_t id) {
    pending_.append(decode_id(vocabulary_, id, pushed_));
    ++pushed_;
    const size_t ready = pending_.size() - incomplete_tail(pending_);
    std::string bytes = pending_.substr(0, ready);
    pending_.erase(0, ready);
    return bytes;
  }

  // Returns what is left, at most three bytes of one incomplete character, and starts anew.
  std::string flush() {
    pushed_ = 0;
    return std::exchange(pending_, {});
  }

  size_t pushed() const { return pushed_; }

 private:
  const Vocabulary& vocabulary_;
  std::string pending_;
  size_t pushed_ = 0;  // ids since the last flush, for messages
};

}  // namespace rwkv
