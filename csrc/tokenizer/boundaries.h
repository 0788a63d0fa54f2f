// Positions where a token must end: between two bytes that stand side by side inside no token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tokenizer/vocabulary.h"

namespace rwkv {

// A text cut at such positions encodes piece by piece to what the whole gives. Most pairs of bytes never meet inside
// a World token (57,203 of 65,536; a letter and a space, say), so pieces are about as long as words.
class Boundaries {
 public:
  explicit Boundaries(const Vocabulary& vocabulary);

  // Bit i is set if a token must end behind text[i], i < 64. Reads text[0 .. 64].
  uint64_t find(const uint8_t* text) const {
    uint64_t mask = 0;
    for (uint32_t i = 0; i < 64; ++i) {
      mask |= static_cast<uint64_t>(splits_[text[i] | text[i + 1] << 8]) << i;
    }
    return mask;
  }

 private:
  std::vector<uint8_t> splits_;  // [a | b << 8] is 1 if a token must end between bytes a and b, else 0
};

}  // namespace rwkv
