// Token ids to bytes.
#pragma once

#include <algorithm>
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

[[noreturn]] inline void throw_changed_ids() {
  throw std::invalid_argument("decode: ids must stay as they are while they are decoded");
}

// The bytes of one id; id 0 ends a document and has none. Throws std::invalid_argument with index and id.
inline std::string_view decode_id(const Vocabulary& vocabulary, int64_t id, size_t index) {
  if (id < 0 || id >= static_cast<int64_t>(kVocabSize)) throw_bad_id(vocabulary, index, std::to_string(id));
  const std::string_view token = vocabulary.token(static_cast<size_t>(id));
  if (token.empty() && id != 0) throw_bad_id(vocabulary, index, std::to_string(id));
  return token;
}

template <typename Id>
size_t count_zeros(const Id* ids, size_t count) {
  constexpr size_t kBlock = 32768;  // few enough for a narrow sum, of which a vector register holds many
  size_t zeros = 0;
  for (size_t block = 0; block < count; block += kBlock) {
    uint16_t in_block = 0;
    for (size_t i = block; i < std::min(count, block + kBlock); ++i) in_block += ids[i] == 0;
    zeros += in_block;
  }
  return zeros;
}

// How many bytes the ids decode to. Throws std::invalid_argument with index and id of the first bad one.
template <typename Id>
size_t decoded_size(const Vocabulary& vocabulary, const Id* ids, size_t count) {
  const uint8_t* lengths = vocabulary.lengths();
  // Sums instead of a test of each id: those without bytes must all be 0.
  size_t size = 0, empty = 0;
  uint64_t high = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint8_t length = lengths[static_cast<uint16_t>(ids[i])];
    size += length;
    empty += length == 0;
    high |= static_cast<uint64_t>(ids[i]) >> 16;
  }
  if (high == 0 && (empty == 0 || empty == count_zeros(ids, count))) return size;
  for (size_t i = 0; i < count; ++i) {
    const auto low = static_cast<uint16_t>(ids[i]);
    if (static_cast<Id>(low) != ids[i] || (lengths[low] == 0 && low != 0)) {
      throw_bad_id(vocabulary, i, std::to_string(ids[i]));
    }
  }
  throw_changed_ids();
}

// Writes the `size` bytes that decoded_size() has counted, and never more: throws std::invalid_argument if the ids do
// not fill them, because another thread has changed an id meanwhile.
template <typename Id>
void decode_to(const Vocabulary& vocabulary, const Id* ids, size_t count, char* bytes, size_t size) {
  const TokenPrefix* prefixes = vocabulary.prefixes();
  const uint8_t* lengths = vocabulary.lengths();
  size_t begin = 0, i = 0;
  while (i < count) {
    // Four tokens by sixteen bytes each, of which the next one writes over what is no part of it.
    for (; i + 4 <= count && size - begin >= 4 * sizeof(TokenPrefix); i += 4) {
      uint16_t id[4];
      for (size_t k = 0; k < 4; ++k) id[k] = static_cast<uint16_t>(ids[i + k]);
      const size_t length[4] = {lengths[id[0]], lengths[id[1]], lengths[id[2]], lengths[id[3]]};
      if ((length[0] | length[1] | length[2] | length[3]) >= sizeof(TokenPrefix)) break;
      for (size_t k = 0; k < 4; ++k) {
        std::memcpy(bytes + begin, prefixes[id[k]], sizeof(TokenPrefix));
        begin += length[k];
      }
    }
    // A long one among four, or the last.
    for (size_t k = 0; k < 4 && i < count; ++k, ++i) {
      const auto id = static_cast<uint16_t>(ids[i]);
      const size_t length = lengths[id];
      if (length <= sizeof(TokenPrefix) && size - begin >= sizeof(TokenPrefix)) {
        std::memcpy(bytes + begin, prefixes[id], sizeof(TokenPrefix));
      } else if (length <= size - begin) {
        std::memcpy(bytes + begin, vocabulary.token(id).data(), length);
      } else {
        throw_changed_ids();
      }
      begin += length;
    }
  }
  if (begin != size) throw_changed_ids();
}

// The bytes of all ids, one after the other.
template <typename Id>
std::string decode(const Vocabulary& vocabulary, const Id* ids, size_t count) {
  std::string bytes(decoded_size(vocabulary, ids, count), '\0');
  decode_to(vocabulary, ids, count, bytes.data(), bytes.size());
  return bytes;
}

}  // namespace rwkv
