// Token ids in memory that grows without being filled first and can be handed over as it is.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace rwkv {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

class IdBuffer {
 public:
  // Makes room for `count` more ids behind size() and returns where they go.
  uint16_t* room(size_t count) {
    if (capacity_ - size_ < count) grow(std::max(size_ + count, capacity_ + capacity_ / 2));
    return ids_.get() + size_;
  }
  // Counts what was written at room() up to `end`.
  void set_end(const uint16_t* end) { size_ = static_cast<size_t>(end - ids_.get()); }

  const uint16_t* data() const { return ids_.get(); }
  size_t size() const { return size_; }

  // The memory itself, no larger than the ids need.
  std::unique_ptr<uint16_t, FreeMemory> release() {
    if (capacity_ > size_ + 64) grow(std::max<size_t>(size_, 1));
    return std::move(ids_);
  }

 private:
  void grow(size_t capacity) {
    auto* moved = static_cast<uint16_t*>(std::realloc(ids_.get(), capacity * sizeof(uint16_t)));
    if (!moved) throw std::bad_alloc();
    (void)ids_.release();
    ids_.reset(moved);
    capacity_ = capacity;
  }

  std::unique_ptr<uint16_t, FreeMemory> ids_;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

}  // namespace rwkv
