// JsonRecord::read() and is_utf8(): the same with and without vector code and whatever follows the line; a text that is
// read from UTF-8 is UTF-8 and fits.
#include "data/json_record.h"
#include "data/utf8_check.h"
#include "oracle.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string lines(reinterpret_cast<const char*>(data), size), line = lines.substr(0, lines.find('\n'));
  REQUIRE(rwkv::is_utf8(lines) == fuzz::is_utf8(lines));
  REQUIRE(rwkv::is_utf8(lines, false) == fuzz::is_utf8(lines));

  rwkv::JsonRecord vectors, plain(false);
  for (const char* key : {"text", "", "a\xc3\xa9"}) {
    std::string_view rest = lines, plain_rest = lines, line_rest = line, text, plain_text;
    const bool is_read = vectors.read(rest, key, text);
    REQUIRE(plain.read(plain_rest, key, plain_text) == is_read);
    REQUIRE(rest == lines.substr(is_read ? line.size() : 0) && plain_rest == rest);
    if (is_read) {
      REQUIRE(text == plain_text);
      REQUIRE(text.size() < line.size());
      REQUIRE(fuzz::is_utf8(text) || !fuzz::is_utf8(line));
    }
    REQUIRE(plain.read(line_rest, key, plain_text) == is_read);
    if (is_read) REQUIRE(text == plain_text && line_rest.empty());
  }
  return 0;
}
