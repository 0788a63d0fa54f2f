#include "data/line_reader.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace rwkv {

// Reads one more block behind the front of a line, with which lines_ then begins if the block has a line end.
void LineReader::read() {
  if (front_ != 0) std::copy(buffer_.data() + front_, buffer_.data() + filled_, buffer_.data());
  filled_ -= front_;
  front_ = 0;

  const size_t at = position_ + filled_;
  const bool is_last = at >= end_;  // the line, whose end is all that is looked for
  char* const block = buffer_.room(filled_, block_);
  ssize_t count;
  do {
    count = pread(file_, block, is_last ? block_ : std::min(block_, end_ - at), static_cast<off_t>(at));
  } while (count < 0 && errno == EINTR);
  if (count < 0) throw std::system_error(errno, std::generic_category());
  const auto size = static_cast<size_t>(count);
  filled_ += size;

  if (size == 0) {
    is_done_ = true;
    if (is_last) front_ = filled_;
  } else if (const void* line_end = is_last ? std::memchr(block, '\n', size) : memrchr(block, '\n', size)) {
    front_ = static_cast<size_t>(static_cast<const char*>(line_end) - buffer_.data()) + 1;
    is_done_ = is_last || position_ + front_ == end_;
  }
  lines_ = {buffer_.data(), front_};
}

}  // namespace rwkv
