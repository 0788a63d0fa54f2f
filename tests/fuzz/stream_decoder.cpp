// StreamDecoder: ids in parts against the whole; what comes out never ends inside a character, and nothing else is held.
#include <algorithm>
#include <stdexcept>
#include <unordered_set>

#include "oracle.h"
#include "tokenizer/stream_decoder.h"

namespace {

void add_utf8(std::string& bytes, uint32_t point) {
  const auto add = [&](uint32_t byte) { bytes += static_cast<char>(byte); };
  if (point < 0x800) return add(0xC0 | point >> 6), add(0x80 | (point & 63));
  if (point < 0x10000) {
    add(0xE0 | point >> 12);
  } else {
    add(0xF0 | point >> 18), add(0x80 | (point >> 12 & 63));
  }
  add(0x80 | (point >> 6 & 63)), add(0x80 | (point & 63));
}

// Every beginning of a character's UTF-8 that is not the whole of it.
const std::unordered_set<std::string>& unfinished_characters() {
  static const auto all = [] {
    std::unordered_set<std::string> starts;
    for (uint32_t point = 0x80; point < 0x110000; point += 64) {  // the last byte has 64 values
      if (point >= 0xD800 && point < 0xE000) continue;
      std::string bytes;
      add_utf8(bytes, point);
      while (bytes.pop_back(), !bytes.empty()) starts.insert(bytes);
    }
    return starts;
  }();
  return all;
}

size_t length_of_unfinished_end(const std::string& bytes) {
  for (size_t length = std::min<size_t>(3, bytes.size()); length > 0; --length) {
    if (unfinished_characters().count(bytes.substr(bytes.size() - length)) != 0) return length;
  }
  return 0;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  const size_t choice = input.take();
  const rwkv::Vocabulary& vocabulary = fuzz::language(choice).vocabulary;
  const std::vector<size_t> lengths = input.take_lengths();
  std::vector<int64_t> ids;
  if (choice & 4) {
    for (const char byte : input.rest()) ids.push_back(static_cast<uint8_t>(byte) + 1);  // the tokens of one byte
  } else {
    while (!input.rest().empty()) {
      const size_t low = input.take();
      ids.push_back(static_cast<int64_t>(low | input.take() << 8));
    }
  }

  rwkv::StreamDecoder stream(vocabulary);
  std::string all, out;
  for (size_t start = 0, i = 0; start < ids.size(); ++i) {
    const size_t count = std::min(lengths[i % lengths.size()], ids.size() - start);
    const std::vector<int64_t> part(ids.begin() + static_cast<std::ptrdiff_t>(start),
                                    ids.begin() + static_cast<std::ptrdiff_t>(start + count));
    start += count;
    std::string bytes;
    bool is_bad = false;
    for (const int64_t id : part) {
      const std::string_view token = vocabulary.token(static_cast<size_t>(id));
      is_bad |= id != 0 && token.empty();
      bytes += token;
    }
    try {
      out += stream.push(part.data(), part.size());
      REQUIRE(!is_bad);
      all += bytes;
    } catch (const std::invalid_argument&) {
      REQUIRE(is_bad);  // and nothing of this part was added
    }
    REQUIRE(out.size() == all.size() - length_of_unfinished_end(all));
  }
  REQUIRE(out + stream.flush() == all);
  REQUIRE(stream.flush().empty() && stream.pushed() == 0);
  return 0;
}
