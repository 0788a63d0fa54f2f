// Token ids in memory that grows without being filled first and can be handed over as it is.
#pragma once

#include <sys/mman.h>

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
    if (capacity_ - size_ < count && !reallocate(std::max(size_ + count, capacity_ + capacity_ / 2))) {
      throw std::bad_alloc();
    }
    return ids_.get() + size_;
  }
  // Makes room for `count` ids in all, for who can guess their number, if there is as much. What of it is not used
  // takes no memory.
  void reserve(size_t count) {
    if (capacity_ < count) (void)reallocate(count);
  }
  // Counts what was written at room() up to `end`.
  void set_end(const uint16_t* end) { size_ = static_cast<size_t>(end - ids_.get()); }

  void clear() { size_ = 0; }

  uint16_t* data() { return ids_.get(); }
  const uint16_t* data() const { return ids_.get(); }
  size_t size() const { return size_; }
  size_t capacity() const { return capacity_; }

  // The memory itself, at most a sixth larger than the ids need.
  std::unique_ptr<uint16_t, FreeMemory> release() {
    if (capacity_ - size_ > size_ / 6 + 64) (void)reallocate(std::max<size_t>(size_, 1));
    return std::move(ids_);
  }

 private:
  bool reallocate(size_t capacity) {
    auto* moved = static_cast<uint16_t*>(std::realloc(ids_.get(), capacity * sizeof(uint16_t)));
    if (!moved) return false;
    (void)ids_.release();
    ids_.reset(moved);
    capacity_ = capacity;
    // Large pages, where there are some to be had: much of the time that new memory takes goes into its small ones.
    const auto begin = (reinterpret_cast<uintptr_t>(moved) + kPage - 1) / kPage * kPage;
    const auto end = reinterpret_cast<uintptr_t>(moved + capacity) / kPage * kPage;
    if (begin + kLarge <= end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    return true;
  }

  static constexpr size_t kPage = 4096, kLarge = 4 << 20;  // bytes

  std::unique_ptr<uint16_t, FreeMemory> ids_;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

}  // namespace rwkv
