// StreamEncoder: text in chunks against the whole; nothing is held that is certain.
#include "oracle.h"
#include "tokenizer/decoder.h"
#include "tokenizer/stream_encoder.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  const size_t choice = input.take();
  const fuzz::Language& language = fuzz::language(choice);
  const std::vector<size_t> lengths = input.take_lengths();
  const std::string text = input.rest(1 + choice / 4 % 8);

  rwkv::StreamEncoder stream(language.encoder);
  for (int turn = 0; turn < 2; ++turn) {  // a flushed stream is as good as new
    rwkv::IdBuffer ids;
    size_t encoded = 0;  // bytes
    for (size_t start = 0, i = 0; start < text.size(); ++i) {
      const std::string chunk(text.substr(start, lengths[i % lengths.size()]));
      const size_t first = ids.size();
      stream.push(chunk, ids);
      start += chunk.size();
      for (size_t k = first; k < ids.size(); ++k) encoded += language.vocabulary.token(ids.data()[k]).size();
      REQUIRE(start - encoded == stream.held());
      REQUIRE(stream.held() == 0 || language.is_unfinished(std::string_view(text).substr(encoded, stream.held())));
    }
    stream.flush(ids);
    REQUIRE(stream.held() == 0);
    REQUIRE(fuzz::to_vector(ids) == language.encode(text));
  }
  return 0;
}
