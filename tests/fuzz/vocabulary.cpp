// TokenList::parse(): any file is refused with a message that Python can show, or read as it is written.
#include <stdexcept>

#include "oracle.h"
#include "tokenizer/literal.h"
#include "tokenizer/token_list.h"

namespace {

// A vocabulary that was read, written in the plainest way, reads as the same.
void check(const rwkv::TokenList& tokens, const std::string& text) {
  std::string plain;
  size_t count = 0;
  for (size_t id = 1; id < rwkv::kVocabSize; ++id) {
    if (tokens.token(id).empty()) continue;
    REQUIRE(tokens.token(id).size() <= rwkv::kMaxTokenBytes);
    plain += fuzz::line_of(id, tokens.token(id));
    ++count;
  }
  size_t lines = text.empty() || text.back() == '\n' ? 0 : 1;
  for (const char c : text) lines += c == '\n';
  REQUIRE(count == lines);
  const rwkv::TokenList again = rwkv::TokenList::parse(plain, "again");
  REQUIRE(again.last_id() == tokens.last_id());
  for (size_t id = 0; id < rwkv::kVocabSize; ++id) REQUIRE(again.token(id) == tokens.token(id));
}

// What a vocabulary was read from has much in common with its tokens.
void check_encoder(const fuzz::Language& language, const std::string& text) {
  rwkv::IdBuffer ids;
  language.encoder.encode(text, ids);
  REQUIRE(fuzz::to_vector(ids) == language.encode(text));
}

// The part of a line that has a grammar of its own, a thousand times as fast without the rest.
int check_literal(std::string_view literal) {
  try {
    REQUIRE(rwkv::parse_literal(literal).size() < literal.size());
  } catch (const std::invalid_argument& error) {
    REQUIRE(fuzz::is_utf8(error.what()));
  }
  return 0;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  static const std::string bytes = fuzz::byte_lines();
  const size_t choice = input.take();
  if (choice >= 128) return check_literal(input.rest());
  std::string text = choice % 8 == 0 ? std::string() : bytes;  // most inputs are the lines behind those of all bytes
  text += input.rest();
  try {
    const rwkv::TokenList tokens = rwkv::TokenList::parse(text, "fuzz");
    check(tokens, text);
    // Its tables take a hundred times as long as its text: for one in eight.
    if (choice % 8 == 1 && text.size() % 8 == 0) check_encoder(fuzz::Language(text), input.rest(5));
  } catch (const std::invalid_argument& error) {
    const std::string_view message = error.what();
    REQUIRE(fuzz::is_utf8(message));
    REQUIRE(message.rfind("vocabulary fuzz", 0) == 0);
    REQUIRE(message.find("; use an intact copy of the vocabulary file") != message.npos);
  }
  return 0;
}
