// Memory that grows and keeps what is in it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#include "tokenizer/id_buffer.h"

namespace rwkv {

class GrowingBytes {
 public:
  // For `count` bytes behind the first `kept`, which stay.
  char* room(size_t kept, size_t count) {
    if (size_ - kept < count) {
      const size_t size = std::max(kept + count, size_ + size_ / 2);
      void* moved = std::realloc(bytes_.get(), size);
      if (!moved) throw std::bad_alloc();
      (void)bytes_.release();
      bytes_.reset(static_cast<char*>(moved));
      size_ = size;
    }
    return bytes_.get() + kept;
  }

  char* data() { return bytes_.get(); }

 private:
  std::unique_ptr<char, FreeMemory> bytes_;
  size_t size_ = 0;
};

}  // namespace rwkv
