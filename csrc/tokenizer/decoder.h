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

// How many bytes the ids decode to. Throws std::invalid_argument with index and id of the first bad one.
template <typename Id>
size_t decoded_size(const Vocabulary& vocabulary, const Id* ids, size_t count) {
  const uint8_t* lengths = vocabulary.lengths();
  const auto is_bad = [&](Id id) {
    const auto low = static_cast<uint16_t>(id);
    return (lengths[low] == 0 && low != 0) || static_cast<Id>(low) != id;
  };
  size_t size = 0;
  bool has_bad = false;
  for (size_t i = 0; i < count; ++i) {
    has_bad |= is_bad(ids[i]);
    size += lengths[static_cast<uint16_t>(ids[i])];
  }
  for (size_t i = 0; has_bad && i < count; ++i) {
    if (is_bad(ids[i])) throw_bad_id(vocabulary, i, std::to_string(ids[i]));
  }
  return size;
}

// Writes the `size` bytes that decoded_size() has counted, and never more: throws std::invalid_argument if the ids do
// not fill them, because another thread has changed an id meanwhile.
template <typename Id>
void decode_to(const Vocabulary& vocabulary, const Id* ids, size_t count, char* bytes, size_t size) {
  const TokenSlot* slots = vocabulary.slots();
  size_t begin = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto id = static_cast<uint16_t>(ids[i]);
    const TokenSlot slot = slots[id];
    if (slot.length <= TokenSlot::kMaxBytes && size - begin >= sizeof slot) {
      // All sixteen bytes: the next token writes over what is no part of this one.
      std::memcpy(bytes + begin, &slot, sizeof slot);
    } else {
      const std::string_view token = vocabulary.token(id);
      if (token.size() > size - begin) break;
      std::memcpy(bytes + begin, token.data(), token.size());
    }
    begin += slot.length;
  }
  if (begin != size) throw std::invalid_argument("decode: ids must stay as they are while they are decoded");
}

// The bytes of all ids, one after the other.
template <typename Id>
std::string decode(const Vocabulary& vocabulary, const Id* ids, size_t count) {
  std::string bytes(decoded_size(vocabulary, ids, count), '\0');
  decode_to(vocabulary, ids, count, bytes.data(), bytes.size());
  return bytes;
}

}  // namespace rwkv
