#include "tokenizer/segment_memo.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "tokenizer/decoder.h"

namespace rwkv {

bool SegmentMemo::is_right() {
  if (waiting_.count != 0 && !is_waiting_right()) is_right_ = false;
  waiting_.count = 0;
  return is_right_;
}

// Most tokens are not in the cache, and to wait for them here would take as long as the segment took to encode. So they
// are sent for, and looked at when the next segment comes.
void SegmentMemo::verify_soon(const uint16_t* ids, const uint16_t* end, const uint8_t* text, size_t length) {
  if (length > LongEntry::kMaxLength) {
    is_right_ = is_right_ && are_of(ids, end, text, length);
    return;
  }
  (void)is_right();
  std::memset(waiting_.text, 0, sizeof waiting_.text);
  std::memcpy(waiting_.text, text, length);
  std::copy(ids, end, waiting_.ids);
  waiting_.length = length;
  waiting_.count = static_cast<size_t>(end - ids);
  for (; ids != end; ++ids) __builtin_prefetch(vocabulary_->short_tokens() + *ids);
}

bool SegmentMemo::is_waiting_right() const {
  char bytes[sizeof waiting_.text + sizeof(ShortToken)] = {};
  size_t size = 0;
  for (size_t i = 0; i < waiting_.count; ++i) {
    if (!add_short_token(vocabulary_->short_tokens(), waiting_.ids[i], bytes, size) || size > waiting_.length) {
      return are_of(waiting_.ids, waiting_.ids + waiting_.count, waiting_.text, waiting_.length);
    }
  }
  std::memset(bytes + size, 0, sizeof(ShortToken));  // behind the last one
  return size == waiting_.length && std::memcmp(bytes, waiting_.text, sizeof waiting_.text) == 0;
}

bool SegmentMemo::are_of(const uint16_t* ids, const uint16_t* end, const uint8_t* text, size_t length) const {
  char bytes[2 * sizeof(LongEntry::key)];
  for (std::string_view rest(reinterpret_cast<const char*>(text), length);;) {
    size_t size = 0;
    while (ids != end && size <= sizeof bytes - sizeof(ShortToken) &&
           add_short_token(vocabulary_->short_tokens(), *ids, bytes, size)) {
      ++ids;
    }
    if (rest.substr(0, size) != std::string_view(bytes, size)) return false;
    rest.remove_prefix(size);
    if (ids == end) return rest.empty();
    const std::string_view token = vocabulary_->token(*ids++);
    if (token.empty() || rest.substr(0, token.size()) != token) return false;
    rest.remove_prefix(token.size());
  }
}

}  // namespace rwkv
