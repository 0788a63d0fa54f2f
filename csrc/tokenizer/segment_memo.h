// What short segments of a text encoded to, so that a word seen before costs one look-up.
#pragma once

#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <type_traits>

namespace rwkv {

// What a segment of at most 8 * kWords bytes encoded to, if that is few enough ids.
template <size_t kWords>
struct MemoEntry {
  static constexpr size_t kMaxBytes = 8 * kWords;
  static constexpr size_t kMaxIds = 4 * kWords - 1;

  uint64_t bytes[kWords];  // the segment, zeros behind it
  uint16_t ids[kMaxIds];
  uint8_t length;  // in bytes; 0 if the entry is empty
  uint8_t count;   // of ids
};

using ShortEntry = MemoEntry<2>;  // 32 bytes: words in Latin letters
using LongEntry = MemoEntry<4>;   // 64 bytes: words in letters of two or three bytes

// Direct-mapped: a segment has one place and replaces what is there. An entry holds its whole segment, so a hit is
// never a guess. For one thread at a time, and for one encoder.
class SegmentMemo {
 public:
  SegmentMemo() {
    // As many addresses again, of which the part is used that starts where a large page does: one large page of zeros,
    // if the system gives one, takes a tenth of the time of 512 small ones that are touched one by one.
    memory_ = mmap(nullptr, 2 * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    const auto begin = (reinterpret_cast<uintptr_t>(memory_) + kBytes - 1) / kBytes * kBytes;
    (void)madvise(reinterpret_cast<void*>(begin), kBytes, MADV_HUGEPAGE);
    short_ = reinterpret_cast<ShortEntry*>(begin);
    long_ = reinterpret_cast<LongEntry*>(begin + kShortBytes);
  }
  ~SegmentMemo() { munmap(memory_, 2 * kBytes); }
  SegmentMemo(const SegmentMemo&) = delete;
  SegmentMemo& operator=(const SegmentMemo&) = delete;

  // The entry of text[0 .. length), 1 <= length <= Entry::kMaxBytes, with `bytes` set to the segment. Reads
  // Entry::kMaxBytes from the text.
  template <typename Entry>
  Entry& find(const uint8_t* text, size_t length, decltype(Entry::bytes)& bytes) {
    decltype(Entry::bytes) keep;
    std::memcpy(bytes, text, sizeof bytes);
    std::memcpy(keep, kKeep + LongEntry::kMaxBytes - length, sizeof keep);
    uint64_t hash = 0;
    for (size_t i = 0; i < std::size(bytes); ++i) {
      bytes[i] &= keep[i];
      hash ^= bytes[i] * kOdd[i];
    }
    hash = (hash ^ hash >> 32) * 0xD6E8FEB86659FD93;
    if constexpr (std::is_same_v<Entry, ShortEntry>) {
      return short_[hash >> (64 - kLogShort)];
    } else {
      return long_[hash >> (64 - kLogLong)];
    }
  }

 private:
  static constexpr int kLogShort = 15;  // 1 MiB
  static constexpr int kLogLong = 14;   // 1 MiB
  static constexpr uint64_t kOdd[4] = {0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63};
  static constexpr uint8_t kKeep[2 * LongEntry::kMaxBytes] = {
      255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
      255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};  // then as many zeros

  static constexpr size_t kShortBytes = sizeof(ShortEntry) << kLogShort;
  static constexpr size_t kBytes = kShortBytes + (sizeof(LongEntry) << kLogLong);
  static_assert(kBytes == 2 << 20, "a large page");

  void* memory_;
  ShortEntry* short_;
  LongEntry* long_;
};

// The memos of one encoder, lent to one call at a time: as many exist as calls ever ran at once, kSlots at most
// between calls. No lock, so a fork in the middle of another thread's call leaves nothing locked.
class MemoPool {
 public:
  MemoPool() = default;
  ~MemoPool() {
    for (auto& slot : slots_) delete slot.load();
  }
  MemoPool(const MemoPool&) = delete;
  MemoPool& operator=(const MemoPool&) = delete;

  std::unique_ptr<SegmentMemo> take() {
    for (auto& slot : slots_) {
      if (slot.load(std::memory_order_relaxed) == nullptr) continue;
      if (SegmentMemo* memo = slot.exchange(nullptr, std::memory_order_acquire)) {
        return std::unique_ptr<SegmentMemo>(memo);
      }
    }
    return std::make_unique<SegmentMemo>();
  }

  void give_back(std::unique_ptr<SegmentMemo> memo) {
    for (auto& slot : slots_) {
      SegmentMemo* empty = nullptr;
      if (slot.compare_exchange_strong(empty, memo.get(), std::memory_order_release, std::memory_order_relaxed)) {
        (void)memo.release();
        return;
      }
    }
  }

 private:
  static constexpr size_t kSlots = 16;
  std::array<std::atomic<SegmentMemo*>, kSlots> slots_{};
};

}  // namespace rwkv
