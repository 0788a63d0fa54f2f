// JsonRecord::read() and is_utf8(): the same with and without vector code; a text that is read is UTF-8 and fits.
#include "data/json_record.h"
#include "data/utf8_check.h"
#include "oracle.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string line(reinterpret_cast<const char*>(data), size);
  REQUIRE(rwkv::is_utf8(line) == fuzz::is_utf8(line));
  REQUIRE(rwkv::is_utf8(line, false) == fuzz::is_utf8(line));
  if (!fuzz::is_utf8(line) || line.find('\n') != line.npos) return 0;  // never given to read()

  rwkv::JsonRecord vectors, plain(false);
  for (const char* key : {"text", "", "a\xc3\xa9"}) {
    std::string_view text, plain_text;
    const bool is_read = vectors.read(line, key, text);
    REQUIRE(plain.read(line, key, plain_text) == is_read);
    if (!is_read) continue;
    REQUIRE(text == plain_text);
    REQUIRE(text.size() < line.size());
    REQUIRE(fuzz::is_utf8(text));
  }
  return 0;
}
