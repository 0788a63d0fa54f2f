// Text that arrives in chunks to the ids of the whole.
#pragma once

#include <cstddef>
#include <string_view>

#include "tokenizer/encoder.h"
#include "tokenizer/id_buffer.h"
#include "tokenizer/token_list.h"

namespace rwkv {

// Whatever the chunking, characters cut in the middle included, the ids of all push() and the flush() joined are those
// of the whole text. Each comes out with the first byte that makes it certain; until then the start of one token is
// held, so memory is bounded and every byte is looked at a bounded number of times. For one thread at a time.
class StreamEncoder {
 public:
  explicit StreamEncoder(const Encoder& encoder) : encoder_(encoder) {}

  // Adds bytes to the text and appends the ids that no later byte can change. If it throws, nothing was added.
  void push(std::string_view chunk, IdBuffer& ids);

  // Appends the ids of what is held and starts anew: the text ends here.
  void flush(IdBuffer& ids);

  size_t held() const { return held_; }  // bytes

 private:
  void hold(std::string_view bytes);

  const Encoder& encoder_;
  char pending_[kMaxTokenBytes];
  size_t held_ = 0;
};

}  // namespace rwkv
