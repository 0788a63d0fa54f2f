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

// The bytes of one id; id 0 ends a document and has none. Throws std::invalid_argument with index and id.
template <typename Id>
std::string_view decode_id(const Vocabulary& vocabulary, Id id, size_t index) {
  const auto low = static_cast<uint16_t>(id);
  const std::string_view token = vocabulary.token(low);
  if (static_cast<Id>(low) != id || (token.empty() && low != 0)) {
    throw_bad_id(vocabulary, index, std::to_string(id));
  }
  return token;
}

// How many bytes the ids decode to. Those without a token, which decode_to() refuses, are counted as others.
template <typename Id>
size_t decoded_size(const Vocabulary& vocabulary, const Id* ids, size_t count) {
  const uint8_t* lengths = vocabulary.lengths();
  size_t size = 0;
  for (size_t i = 0; i < count; ++i) size += lengths[static_cast<uint16_t>(ids[i])];
  return size;
}

// Exactly that for few ids; of many a little more, as a sample of them says.
template <typename Id>
size_t estimate_decoded_size(const Vocabulary& vocabulary, const Id* ids, size_t count) {
  constexpr uint32_t kSample = 4096;
  if (count < 4 * kSample) return decoded_size(vocabulary, ids, count);
  const uint8_t* lengths = vocabulary.lengths();
  const size_t step = count / kSample;
  size_t size = 0;
  for (uint32_t i = 0; i < kSample; ++i) {
    // Places spread by Fibonacci hashing: ids that come in records of one length have no beat with the steps.
    const uint64_t place = uint64_t{i * 0x9E3779B9u} * step >> 32;
    size += lengths[static_cast<uint16_t>(ids[i * step + place])];
  }
  return size * count / (32 * kSample) * 33;
}

// Adds the bytes of a short token; false for any other id. Writes 16 bytes, of which the next token's take the place of
// those that are no part of this one.
template <typename Id>
inline bool add_short_token(const ShortToken* tokens, Id id, char* bytes, size_t& size) {
  const ShortToken& token = tokens[static_cast<uint16_t>(id)];
  std::memcpy(bytes + size, &token, sizeof token);
  if (token.length == kNotShort || static_cast<uint64_t>(id) >> 16 != 0) return false;
  size += token.length;
  return true;
}

struct Decoded {
  size_t ids = 0, bytes = 0;
};

// Goes on from `done` until no id is left or the next one's bytes find no room. Writes nothing beyond `room`, even if
// another thread changes the ids. Throws std::invalid_argument with index and id of the first bad one.
template <typename Id>
Decoded decode_to(const Vocabulary& vocabulary, const Id* ids, size_t count, char* bytes, size_t room,
                  Decoded done = {}) {
  constexpr size_t kTogether = 4;
  const ShortToken* tokens = vocabulary.short_tokens();
  auto [i, size] = done;
  for (; i < count; ++i) {
    while (count - i >= kTogether && room - size >= kTogether * sizeof(ShortToken)) {
      size_t added = 0;
      while (added < kTogether && add_short_token(tokens, ids[i + added], bytes, size)) ++added;
      i += added;
      if (added < kTogether) break;
    }
    if (i == count) break;
    if (room - size >= sizeof(ShortToken) && add_short_token(tokens, ids[i], bytes, size)) continue;
    const std::string_view token = decode_id(vocabulary, ids[i], i);
    if (token.size() > room - size) break;
    std::memcpy(bytes + size, token.data(), token.size());
    size += token.size();
  }
  return {i, size};
}

// The bytes of all ids, one after the other. `resize(size)` keeps what is written and returns where so many bytes have
// room; what it gets last is the size of all.
//
// To count all bytes beforehand would add a third to the time. Instead there is room for a little more at first than
// they seem to need; should that not do, what is left is counted, and the room grows to just that.
template <typename Id, typename Resize>
void decode(const Vocabulary& vocabulary, const Id* ids, size_t count, Resize resize) {
  size_t room = estimate_decoded_size(vocabulary, ids, count);
  Decoded done = decode_to(vocabulary, ids, count, resize(room), room);
  while (done.ids < count) {
    const size_t left = decoded_size(vocabulary, ids + done.ids, count - done.ids);
    room = done.bytes + std::max(left, kMaxTokenBytes);  // less is left only if another thread changes the ids
    done = decode_to(vocabulary, ids, count, resize(room), room, done);
  }
  if (done.bytes != room) resize(done.bytes);
}

template <typename Id>
std::string decode(const Vocabulary& vocabulary, const Id* ids, size_t count) {
  std::string bytes;
  decode(vocabulary, ids, count, [&bytes](size_t size) {
    bytes.resize(size);
    return bytes.data();
  });
  return bytes;
}

}  // namespace rwkv
