#include "tokenizer/stream_encoder.h"

#include <algorithm>

namespace rwkv {

void StreamEncoder::hold(std::string_view bytes) { held_ = bytes.copy(pending_, sizeof pending_); }

void StreamEncoder::push(std::string_view chunk, IdBuffer& ids) {
  if (held_ > 0) {
    // What is held meets the start of the chunk elsewhere, so that a long chunk is not copied.
    char joined[2 * kMaxTokenBytes];
    const size_t taken = std::min(chunk.size(), kMaxTokenBytes);
    std::copy_n(pending_, held_, joined);
    chunk.copy(joined + held_, taken);
    const std::string_view text(joined, held_ + taken);
    const size_t done = encoder_.encode_certain(text, ids);
    if (taken == chunk.size()) return hold(text.substr(done));
    // The longest token fits behind every byte that was held: done >= held_.
    chunk.remove_prefix(done - held_);
  }
  hold(chunk.substr(encoder_.encode_certain(chunk, ids)));
}

void StreamEncoder::flush(IdBuffer& ids) {
  encoder_.encode({pending_, held_}, ids);
  held_ = 0;
}

}  // namespace rwkv
