// Ids that arrive a few at a time to bytes that never end inside a character.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "tokenizer/decoder.h"
#include "tokenizer/utf8.h"
#include "tokenizer/vocabulary.h"

namespace rwkv {

// Cuts a growing byte string at ends of characters. A token may hold half a character; bytes that cannot
// become part of one come out at once (a decoder replaces them), so the stream never stalls on a broken byte
// or on a genuine U+FFFD. A copy goes on by itself.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Vocabulary& vocabulary) : vocabulary_(&vocabulary) {}

  // Adds ids and returns the bytes up to the last point where no character is left open. A bad id, which is named by
  // its place since the last flush, adds none of them.
  std::string push(const int64_t* ids, size_t count) {
    std::string bytes = pending_;
    for (size_t i = 0; i < count; ++i) bytes += decode_id(*vocabulary_, ids[i], pushed_ + i);
    const size_t ready = bytes.size() - incomplete_tail(bytes);
    pending_ = bytes.substr(ready);
    bytes.resize(ready);
    pushed_ += count;
    return bytes;
  }

  // Returns what is left, at most three bytes of one incomplete character, and starts anew.
  std::string flush() {
    pushed_ = 0;
    return std::exchange(pending_, {});
  }

  size_t pushed() const { return pushed_; }

 private:
  const Vocabulary* vocabulary_;
  std::string pending_;  // at most three bytes
  size_t pushed_ = 0;    // ids since the last flush, for messages
};

}  // namespace rwkv
