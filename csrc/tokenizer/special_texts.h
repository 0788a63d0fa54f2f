// Texts that stand for one id each, where a caller allows it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/encoder.h"
#include "tokenizer/id_buffer.h"

namespace rwkv {

class SpecialTexts {
 public:
  // `text` must not be empty. Of two that are the same, the first counts.
  void add(std::string text, uint16_t id);

  // Appends the ids of `text`: from left to right the next special text, of those that start at the same place the
  // longest, becomes its id, and what lies between is encoded as if it were the whole text.
  void encode(const Encoder& encoder, std::string_view text, IdBuffer& ids) const;

 private:
  struct Special {
    std::string text;
    uint16_t id;
  };
  std::vector<Special> specials_;  // the longest first
};

}  // namespace rwkv
