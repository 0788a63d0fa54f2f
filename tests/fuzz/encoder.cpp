// Encoder: any bytes, with and without vector code, against the plainest longest match; and back.
#include <algorithm>

#include "oracle.h"
#include "tokenizer/decoder.h"

namespace {

std::vector<uint16_t> encode(const rwkv::Encoder& encoder, std::string_view text) {
  rwkv::IdBuffer ids;
  encoder.encode(text, ids);
  return fuzz::to_vector(ids);
}

// Cut where a token must end, behind at least `size` bytes, each part encodes as it does in the whole.
std::vector<uint16_t> encode_parts(const rwkv::Encoder& encoder, std::string_view text, size_t size) {
  rwkv::IdBuffer ids;
  while (!text.empty()) {
    const size_t end = encoder.find_boundary(text, std::min(size, text.size()));
    encoder.encode(text.substr(0, end), ids);
    text.remove_prefix(end);
  }
  return fuzz::to_vector(ids);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  const size_t choice = input.take();
  const fuzz::Language& language = fuzz::language(choice);
  const std::string text = input.rest(1 + choice / 4 % 8);

  const std::vector<uint16_t> ids = language.encode(text);
  REQUIRE(encode(language.encoder, text) == ids);
  REQUIRE(encode(language.encoder, text) == ids);  // now its words are known
  REQUIRE(encode(language.plain_encoder, text) == ids);
  REQUIRE(encode_parts(language.encoder, text, 1 + choice) == ids);
  REQUIRE(rwkv::decode(language.vocabulary, ids.data(), ids.size()) == text);
  return 0;
}
