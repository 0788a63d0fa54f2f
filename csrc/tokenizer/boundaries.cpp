#include "tokenizer/boundaries.h"

namespace rwkv {

Boundaries::Boundaries(const Vocabulary& vocabulary) : splits_(65536, 1) {
  for (size_t id = 1; id < kVocabSize; ++id) {
    const std::string_view token = vocabulary.token(id);
    for (size_t i = 1; i < token.size(); ++i) {
      splits_[static_cast<uint8_t>(token[i - 1]) | static_cast<uint8_t>(token[i]) << 8] = 0;
    }
  }
}

}  // namespace rwkv
