// The entries of a memo by their hash, more of them when those there are do not suffice.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace rwkv {

// Memory of zeros that starts where a large page does: one large page, if the system gives one, is there in a tenth of
// the time of 512 small ones, and its addresses are found sooner.
class LargePages {
 public:
  static constexpr size_t kSize = 2 << 20;

  LargePages() = default;
  // `bytes` is a multiple of kSize. Empty if the system gives no more.
  explicit LargePages(size_t bytes) : mapped_(bytes + kSize) {  // as many more as the begin may be late
    memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ != MAP_FAILED) (void)madvise(data(), bytes, MADV_HUGEPAGE);
  }
  ~LargePages() {
    if (memory_ != MAP_FAILED) munmap(memory_, mapped_);
  }
  LargePages(const LargePages&) = delete;
  LargePages& operator=(LargePages&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }

  explicit operator bool() const { return memory_ != MAP_FAILED; }
  uint8_t* data() const {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory_) + kSize - 1) / kSize * kSize);
  }

 private:
  void* memory_ = MAP_FAILED;
  size_t mapped_ = 0;
};

// Direct-mapped: what has the same hash takes the place of what is there. An entry that is_used() has a key.
template <typename Entry>
class MemoTable {
 public:
  // `count`, a power of two, in memory of zeros that outlives the table. It grows up to `most` bytes.
  MemoTable(uint8_t* memory, size_t count, size_t most)
      : entries_(reinterpret_cast<Entry*>(memory)), mask_(count - 1), most_(most), patience_(kPatience * count) {}

  Entry& operator[](uint64_t hash) { return entries_[hash & mask_]; }

  // To be called when one took the place of another. True once that was so often that to be larger would cost less.
  bool is_too_small() { return --patience_ == 0; }

  // Grows, with all that is in it, if it may and there is memory; else is_too_small() is never true again.
  template <typename Hash>
  void grow(const Hash& hash_of_key) {
    const size_t count = kGrowth * (mask_ + 1);
    if (count * sizeof(Entry) > most_) return;
    LargePages memory(count * sizeof(Entry));
    if (!memory) return;
    MemoTable larger(memory.data(), count, most_);
    for (size_t i = 0; i <= mask_; ++i) {
      if (entries_[i].is_used()) larger[hash_of_key(entries_[i].key)] = entries_[i];
    }
    entries_ = larger.entries_;
    mask_ = larger.mask_;
    patience_ = larger.patience_;
    memory_ = std::move(memory);
  }

 private:
  static constexpr size_t kGrowth = 4;
  static constexpr size_t kPatience = 2;  // replaced for each entry

  Entry* entries_;
  size_t mask_;
  size_t most_;      // bytes
  size_t patience_;  // how many more are replaced before it grows; from 0 on, which is never
  LargePages memory_;  // once it has grown
};

}  // namespace rwkv
