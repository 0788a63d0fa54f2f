// What short segments of a text encoded to, so that a word seen before costs one look-up.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace rwkv {

// Direct-mapped: a segment has one place and replaces what is there. An entry holds its whole segment, so a hit is
// never a guess. For one thread at a time, and for one encoder.
class SegmentMemo {
 public:
  static constexpr size_t kMaxBytes = 16;  // longer segments are not kept
  static constexpr size_t kMaxIds = 7;     // nor those of more ids

  struct Entry {
    uint64_t bytes[2];  // the segment, zeros behind it
    uint16_t ids[kMaxIds];
    uint8_t length;  // in bytes; 0 if the entry is empty
    uint8_t count;   // of ids
  };
  static_assert(sizeof(Entry) == 32);

  SegmentMemo() : entries_(size_t{1} << kLogEntries) {}

  // The entry of text[0 .. length), 1 <= length <= 16, with `bytes` set to the segment. Reads text[0 .. 15].
  Entry& find(const uint8_t* text, size_t length, uint64_t (&bytes)[2]) {
    std::memcpy(bytes, text, kMaxBytes);
    uint64_t keep[2];
    std::memcpy(keep, kKeep + kMaxBytes - length, kMaxBytes);
    bytes[0] &= keep[0];
    bytes[1] &= keep[1];
    uint64_t hash = (bytes[0] ^ bytes[1] * 0xC2B2AE3D27D4EB4F) * 0x9E3779B97F4A7C15;
    hash = (hash ^ hash >> 32) * 0xD6E8FEB86659FD93;
    return entries_[hash >> (64 - kLogEntries)];
  }

 private:
  static constexpr int kLogEntries = 15;  // 1 MiB

  static constexpr uint8_t kKeep[2 * kMaxBytes] = {255, 255, 255, 255, 255, 255, 255, 255,
                                                   255, 255, 255, 255, 255, 255, 255, 255};

  std::vector<Entry> entries_;
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
