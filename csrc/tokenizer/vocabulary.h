// All that the tokenizer looks up, as one image without pointers: made from a vocabulary's text, or mapped from a file.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "tokenizer/boundaries.h"
#include "tokenizer/match_table.h"
#include "tokenizer/token_list.h"

namespace rwkv {

using Sha256 = std::array<uint8_t, 32>;

// What decoding reads of an id at once: a token of up to 15 bytes, zeros behind them, and its length.
struct ShortToken {
  char bytes[15];
  uint8_t length;  // 0 for id 0; kNotShort for a longer token and for none
};
static_assert(sizeof(ShortToken) == 16);
constexpr uint8_t kNotShort = 0xFF;

// Immutable. Copies share the memory, which the last of them frees or unmaps.
class Vocabulary {
 public:
  // Reads a text as TokenList::parse() does, with its exceptions, and builds the tables. `digest` is kept in the image.
  static Vocabulary parse(std::string_view text, const std::string& name, const Sha256& digest = {});

  // Maps a file that holds the image() of a vocabulary. Throws std::invalid_argument that names the file and what was
  // found unless every byte is as it was written and no content can lead a reader out of the tables.
  static Vocabulary map(const std::string& path);

  // The bytes of an id below kVocabSize; empty for id 0 (end of document) and for ids without a token.
  std::string_view token(size_t id) const {
    return {token_bytes_ + offsets_[id], offsets_[id + 1] - offsets_[id]};
  }

  // The highest id that has a token: 65529 in the World vocabulary.
  size_t last_id() const;

  const MatchCell* cells() const { return cells_; }
  const BoundaryTables& boundary_tables() const { return *boundary_tables_; }
  const ShortToken* short_tokens() const { return short_tokens_; }  // [kVocabSize]
  const uint8_t* lengths() const { return lengths_; }               // [kVocabSize]; 0 for ids without a token

  // The size and the digest of the text that the tables were made from.
  uint64_t source_size() const;
  Sha256 source_digest() const;

  std::string_view image() const;

 private:
  explicit Vocabulary(std::shared_ptr<const uint8_t> image);

  std::shared_ptr<const uint8_t> image_;
  const BoundaryTables* boundary_tables_;
  const ShortToken* short_tokens_;
  const uint8_t* lengths_;
  const uint32_t* offsets_;  // [kVocabSize + 1] of each token in token_bytes_
  const MatchCell* cells_;
  const char* token_bytes_;
};

}  // namespace rwkv
