// Text to token ids: from left to right, always the longest token that matches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenizer/boundaries.h"
#include "tokenizer/id_buffer.h"
#include "tokenizer/match_table.h"
#include "tokenizer/segment_loop.h"
#include "tokenizer/segment_memo.h"
#include "tokenizer/vocabulary.h"

namespace rwkv {

// How many ids to reserve room for, of a short text: more than nearly every text of so many bytes has.
constexpr size_t expected_ids(size_t bytes) { return bytes / 2 + 4096; }

// The only state is the position, so any two encodings that share one token boundary agree after it: a segment between
// two boundaries that no token can cross encodes the same wherever it stands, and is looked up if it was seen before.
// Immutable but for the pool of memos: any number of threads may encode with one Encoder.
class Encoder {
 public:
  // Keeps the vocabulary's tables. use_vectors false: plain C++ whatever the CPU can do; the ids are the same.
  explicit Encoder(const Vocabulary& vocabulary, bool use_vectors = true);

  const Vocabulary& vocabulary() const { return vocabulary_; }

  // What the texts of one thread share: lent by the encoder, given back at the end.
  class Memo {
   public:
    // verify: whether what is encoded is decoded again and compared; a segment that is seen again, once for all.
    explicit Memo(const Encoder& encoder, bool verify = false)
        : pool_(verify ? encoder.verified_memos_ : encoder.memos_), memo_(pool_.take()) {}
    ~Memo() { pool_.give_back(std::move(memo_)); }
    Memo(const Memo&) = delete;
    Memo& operator=(const Memo&) = delete;

    // Whether all ids so far were those of their texts, as far as they are verified.
    bool is_right() const { return memo_->is_right(); }

   private:
    friend class Encoder;
    MemoPool& pool_;
    std::unique_ptr<SegmentMemo> memo_;
  };

  // Appends the ids of any bytes, UTF-8 or not. Never produces id 0.
  void encode(std::string_view text, IdBuffer& ids) const { encode(text, ids, Memo(*this)); }
  void encode(std::string_view text, IdBuffer& ids, const Memo& memo) const;

  // How many ids to reserve room for, of all texts: a little more than they have if they are like parts of them. Memory
  // that need not be cut to size afterwards is memory that the next call can have without a page fault.
  size_t expected_ids(const std::vector<std::string_view>& texts) const;

  // The first position behind `start`, or the text's end, where a token must end, if one ends at the text's begin.
  size_t find_boundary(std::string_view text, size_t start) const;

  // Appends the ids that every text starts with that starts with `text`; returns how many bytes they stand for.
  // Fewer than kMaxTokenBytes are left: the start of a token.
  size_t encode_certain(std::string_view text, IdBuffer& ids) const;

 private:
  // A text, how far it is encoded, and what that takes. `out` has room for one id a byte, and for kSlack more because
  // ids are written up to sixteen at once.
  struct Run {
    const uint8_t* text;
    size_t size;
    size_t start;  // of the segment that is not encoded yet
    uint16_t* out;
    SegmentMemo& memo;
  };

  void encode_pieces(Run& run, size_t last, IdBuffer& ids) const;
  void encode_segments(Run& run, size_t piece, size_t end, uint16_t* ends) const;
  void match_tokens(Run& run, size_t end, size_t limit) const;

  Vocabulary vocabulary_;
  const MatchCell* cells_;
  Boundaries boundaries_;
  SegmentLoop segment_loop_;
  mutable MemoPool memos_{nullptr};
  mutable MemoPool verified_memos_{&vocabulary_};
};

}  // namespace rwkv
