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
// thread takes what is next, and its ids go to their place as soon as those before them are counted.
class BatchEncoder {
 public:
  // Encodes with `threads` threads (at least 1), the calling one among them; fewer if the system gives no more.
  BatchEncoder(const Encoder& encoder, const std::vector<std::string_view>& texts, size_t threads);

  // [texts + 1]: the ids of text i are those from offsets()[i] up to offsets()[i + 1].
  const std::vector<int64_t>& offsets() const { return offsets_; }

  // Of all texts, offsets().back() of them.
  const IdBuffer& ids() const { return ids_; }
  IdBuffer take_ids() { return std::move(ids_); }

  // Writes all ids, with as many threads.
  void copy(uint32_t* ids) const;

 private:
  struct Piece {
    std::string_view text;
    size_t count;  // of its ids
  };
  class Worker;

  void cut(const Encoder& encoder, std::string_view text);

  size_t threads_;
  std::vector<Piece> pieces_;
  std::vector<size_t> tasks_;  // [tasks + 1] what a thread takes at once: pieces_[tasks_[i] .. tasks_[i + 1])
  IdBuffer ids_;
  std::vector<int64_t> offsets_;
};

}  // namespace rwkv
