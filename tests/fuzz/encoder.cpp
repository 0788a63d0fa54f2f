// Encoder: any bytes, with and without vector code, against the plainest longest match; and back.
#include "oracle.h"
#include "tokenizer/decoder.h"

namespace {

std::vector<uint16_t> encode(const rwkv::Encoder& encoder, std::string_view text) {
  rwkv::IdBuffer ids;
  encoder.encode(text, ids);
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
  REQUIRE(rwkv::decode(language.vocabulary, ids.data(), ids.size()) == text);
  return 0;
}
