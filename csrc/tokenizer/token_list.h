// The tokens of a vocabulary's text file, such as the World tokenizer's: the bytes each id stands for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rwkv {

constexpr size_t kVocabSize = 65536;    // rows of the models' embedding and head; ids fit uint16
constexpr size_t kMaxTokenBytes = 255;  // byte lengths are handed out as uint8

class TokenList {
 public:
  // Reads lines `ID SP LITERAL SP LENGTH`, ended by LF or CRLF, where LITERAL is a Python literal ('..', ".."
  // or b'..') and LENGTH counts its bytes. Ids lie in 1..65535 in any order. Throws std::invalid_argument
  // that names the file and the line.
  static TokenList parse(std::string_view text, const std::string& name);

  // The bytes of an id below kVocabSize; empty for id 0 (end of document) and for ids without a token.
  std::string_view token(size_t id) const {
    return {bytes_.data() + offsets_[id], offsets_[id + 1] - offsets_[id]};
  }

  // The highest id that has a token: 65529 in the World vocabulary.
  size_t last_id() const { return last_id_; }

 private:
  std::string bytes_;              // all tokens back to back, by id
  std::vector<uint32_t> offsets_;  // [kVocabSize + 1]
  size_t last_id_ = 0;
};

}  // namespace rwkv
