// decode(): any ids, as numbers of 16 and of 64 bits, together and in parts, against the tokens one after the other.
#include <cstring>
#include <memory>
#include <stdexcept>

#include "oracle.h"
#include "tokenizer/decoder.h"

namespace {

constexpr size_t kNone = SIZE_MAX;

// Decodes, or returns in `bad` the index that the refusal names.
template <typename Id>
std::string decode(const rwkv::Vocabulary& vocabulary, const std::vector<Id>& ids, size_t& bad) {
  bad = kNone;
  try {
    return rwkv::decode(vocabulary, ids.data(), ids.size());
  } catch (const std::invalid_argument& error) {
    REQUIRE(std::sscanf(error.what(), "decode: ids[%zu] must be 0 or the id of a token", &bad) == 1);
    REQUIRE(bad < ids.size());
    REQUIRE(std::strstr(error.what(), ("got " + std::to_string(ids[bad]) + ";").c_str()) != nullptr);
    return {};
  }
}

// With memory of just `room` bytes for each part, so that what is written behind its end is seen.
std::string decode_in_parts(const rwkv::Vocabulary& vocabulary, const std::vector<uint16_t>& ids, size_t room) {
  std::string bytes;
  for (size_t start = 0; start < ids.size();) {
    const std::unique_ptr<char[]> part(new char[room]);
    const rwkv::Decoded done = rwkv::decode_to(vocabulary, &ids[start], ids.size() - start, part.get(), room);
    REQUIRE(done.ids > 0 && done.bytes <= room);
    bytes.append(part.get(), done.bytes);
    start += done.ids;
  }
  return bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  const size_t choice = input.take();
  const rwkv::Vocabulary& vocabulary = fuzz::language(choice).vocabulary;
  const bool is_wide = choice & 4;
  std::vector<int64_t> wide;
  while (!input.rest().empty()) {
    uint64_t id = input.take();
    id |= static_cast<uint64_t>(input.take()) << 8;
    if (is_wide && input.take() == 0xFF) id = id << (input.take() % 64) ^ id;  // seldom a large or negative one
    wide.push_back(static_cast<int64_t>(id));
  }

  std::string bytes;
  size_t bad = kNone;
  for (size_t i = 0; i < wide.size() && bad == kNone; ++i) {
    const bool is_id = wide[i] >= 0 && wide[i] < 65536;
    const std::string_view token = is_id ? vocabulary.token(static_cast<size_t>(wide[i])) : std::string_view();
    if (token.empty() && wide[i] != 0) bad = i;
    bytes += token;
  }
  if (bad != kNone) bytes.clear();
  size_t refused;
  REQUIRE(decode(vocabulary, wide, refused) == bytes);
  REQUIRE(refused == bad);
  if (!is_wide) {
    const std::vector<uint16_t> ids(wide.begin(), wide.end());
    REQUIRE(decode(vocabulary, ids, refused) == bytes);
    REQUIRE(refused == bad);
    if (bad == kNone) REQUIRE(decode_in_parts(vocabulary, ids, rwkv::kMaxTokenBytes + size % 64) == bytes);
  }
  return 0;
}
