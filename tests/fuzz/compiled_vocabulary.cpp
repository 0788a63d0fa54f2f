// Vocabulary::map(): a damaged file is refused with a message; one with a right checksum leads nobody out of its tables.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "oracle.h"
#include "tokenizer/decoder.h"
#include "tokenizer/stream_encoder.h"

namespace {

constexpr size_t kChecksumAt = 16, kCheckedFrom = 24;  // in the file

// As vocabulary.cpp has it. Were it another, the undamaged image would not pass below.
uint64_t checksum(const std::string& bytes) {
  uint64_t sums[4] = {1, 2, 3, 4};
  const auto add = [](uint64_t& sum, uint64_t word) {
    sum = (sum ^ word) * 0x9E3779B97F4A7C15;
    sum ^= sum >> 32;
  };
  const size_t words = (bytes.size() - kCheckedFrom) / 8;
  for (size_t i = 0; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, bytes.data() + kCheckedFrom + 8 * i, 8);
    add(sums[i < words / 4 * 4 ? i % 4 : 0], word);
  }
  uint64_t result = 8 * words;
  for (const uint64_t sum : sums) add(result, sum);
  return result;
}

// The path of a file that lies in memory.
std::string path_of(const std::string& bytes) {
  static const int file = memfd_create("vocabulary", 0);
  REQUIRE(file >= 0 && ftruncate(file, 0) == 0);
  REQUIRE(pwrite(file, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
  return "/proc/self/fd/" + std::to_string(file);
}

void use(const rwkv::Vocabulary& vocabulary, const std::string& text) {
  std::vector<int64_t> ids;
  for (int64_t id = 0; id < 65536; ++id) {
    if (id == 0 || !vocabulary.token(static_cast<size_t>(id)).empty()) ids.push_back(id);
  }
  size_t bytes = 0;
  for (const int64_t id : ids) bytes += vocabulary.token(static_cast<size_t>(id)).size();
  REQUIRE(rwkv::decode(vocabulary, ids.data(), ids.size()).size() == bytes);
  for (const bool use_vectors : {true, false}) {
    const rwkv::Encoder encoder(vocabulary, use_vectors);
    rwkv::IdBuffer whole, parts;
    encoder.encode(text, whole);
    rwkv::StreamEncoder stream(encoder);
    for (size_t start = 0; start < text.size(); start += 300) stream.push(text.substr(start, 300), parts);
    REQUIRE(stream.held() < rwkv::kMaxTokenBytes);
    stream.flush(parts);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  const rwkv::Vocabulary& vocabulary = fuzz::language(3).vocabulary;
  std::string image(vocabulary.image());
  const size_t choice = input.take();
  for (size_t count = choice / 2 % 8; count > 0; --count) {
    const size_t low = input.take(), middle = input.take(), place = low | middle << 8 | input.take() << 16;
    const size_t at = place < image.size() ? place : place % 256;  // often the header
    image[at] = static_cast<char>(input.take());
  }
  if (choice & 64) image.resize(input.take() * input.take() % (image.size() + 1));
  if (choice & 1 && image.size() > kCheckedFrom) {
    const uint64_t sum = checksum(image);
    std::memcpy(&image[kChecksumAt], &sum, sizeof sum);
  }
  try {
    const rwkv::Vocabulary mapped = rwkv::Vocabulary::map(path_of(image));
    if (!(choice & 1)) REQUIRE(image == vocabulary.image());
    use(mapped, input.rest(1 + choice / 128 * 20));
  } catch (const std::invalid_argument& error) {
    REQUIRE(image != vocabulary.image());
    REQUIRE(fuzz::is_utf8(error.what()));
    REQUIRE(std::strstr(error.what(), "; make it anew with `make build`") != nullptr);
  }
  return 0;
}
