// Many texts, or a long one, encoded by several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "tokenizer/encoder.h"
#include "tokenizer/id_buffer.h"

namespace rwkv {

// Texts are cut where a token must end, so the ids are those of the whole texts, whatever the number of threads. Each
// thread takes what is next and keeps the ids it made; copy() puts them in the order of the texts.
class BatchEncoder {
 public:
  // Encodes with `threads` threads (at least 1), the calling one among them; fewer if the system gives no more.
  BatchEncoder(const Encoder& encoder, const std::vector<std::string_view>& texts, size_t threads);

  // [texts + 1]: the ids of text i are those from offsets()[i] up to offsets()[i + 1].
  const std::vector<int64_t>& offsets() const { return offsets_; }

  // Writes all ids, offsets().back() of them, with as many threads.
  template <typename Id>
  void copy(Id* ids) const;

 private:
  struct Piece {
    std::string_view text;
    size_t thread;  // that encoded it
    size_t begin, count;  // of its ids in that thread's buffer
    size_t offset;        // of its ids among all
  };

  void cut(const Encoder& encoder, std::string_view text);

  size_t threads_;
  std::vector<Piece> pieces_;
  std::vector<size_t> tasks_;  // [tasks + 1] what a thread takes at once: pieces_[tasks_[i] .. tasks_[i + 1])
  std::vector<IdBuffer> ids_;  // [threads]
  std::vector<int64_t> offsets_;
};

}  // namespace rwkv
