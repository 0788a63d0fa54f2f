// What short segments of a text encoded to, so that a word seen before costs one look-up.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "tokenizer/memo_table.h"
#include "tokenizer/vocabulary.h"

namespace rwkv {

// A segment of fewer than kBytes bytes, zeros behind them, its length in the last byte; all zeros if there is none.
template <size_t kBytes>
struct SegmentKey {
  uint8_t bytes[kBytes];
};

// What a segment encoded to, if that is few enough ids.
template <size_t kBytes>
struct MemoEntry {
  static constexpr size_t kKeyBytes = kBytes;
  static constexpr size_t kMaxLength = kBytes - 1;   // of the segment
  static constexpr size_t kMaxIds = kBytes / 2 - 1;

  SegmentKey<kBytes> key;
  uint16_t ids[kMaxIds];
  uint16_t count;  // of ids

  bool is_used() const { return key.bytes[kBytes - 1] != 0; }
};

using ShortEntry = MemoEntry<16>;  // 32 bytes: words in Latin letters
using LongEntry = MemoEntry<32>;   // 64 bytes: words in letters of two or three bytes

// What the last sixteen bytes of a key are made with: those of the text, and one row, or the other.
struct KeyRows {
  alignas(16) uint8_t keep[32];  // at keep + 16 - n: n bytes of ones, then zeros
  alignas(16) uint8_t length[LongEntry::kMaxLength + 1][16];  // [n] has n in its last byte, zeros before it
};
constexpr KeyRows make_key_rows() {
  KeyRows rows{};
  for (size_t i = 0; i < 16; ++i) rows.keep[i] = 255;
  for (uint8_t n = 0; n <= LongEntry::kMaxLength; ++n) rows.length[n][15] = n;
  return rows;
}
inline constexpr KeyRows kKeyRows = make_key_rows();

// A segment has one place and replaces what is there. An entry holds its whole segment, so a hit is never a guess. For
// one thread at a time, and for one encoder.
//
// With a vocabulary, ids are verified with it: that what they decode to is their text. Those of a segment are when it
// comes to the memo, so that a hit, which compares the segment, needs no more than that.
class SegmentMemo {
 public:
  explicit SegmentMemo(const Vocabulary* verify_with)
      : memory_(LargePages::kSize),
        short_(memory_.data(), kShort, most_bytes(verify_with)),
        long_(memory_.data() + kShort * sizeof(ShortEntry), kLong, most_bytes(verify_with)),
        vocabulary_(verify_with) {
    if (!memory_) throw std::bad_alloc();
    // All of it now, so that no text waits for it.
    for (size_t page = 0; page < LargePages::kSize; page += 4096) *(memory_.data() + page) = 0;
  }
  SegmentMemo(const SegmentMemo&) = delete;
  SegmentMemo& operator=(const SegmentMemo&) = delete;

  // For all ids that are not in the memo.
  void verify(const uint16_t* ids, const uint16_t* end, const uint8_t* text, size_t length) {
    if (vocabulary_) [[unlikely]] verify_soon(ids, end, text, length);
  }

  // Whether all ids so far were right.
  bool is_right();

  template <typename Entry>
  MemoTable<Entry>& table() {
    if constexpr (std::is_same_v<Entry, ShortEntry>) {
      return short_;
    } else {
      return long_;
    }
  }

 private:
  // A segment whose tokens are on their way to the cache.
  struct Waiting {
    uint8_t text[sizeof(LongEntry::key)] = {};  // zeros behind it
    uint16_t ids[LongEntry::kMaxLength];
    size_t length = 0, count = 0;
  };

  void verify_soon(const uint16_t* ids, const uint16_t* end, const uint8_t* text, size_t length);
  bool is_waiting_right() const;  // in one comparison, where its tokens are short: nearly always
  bool are_of(const uint16_t* ids, const uint16_t* end, const uint8_t* text, size_t length) const;

  // What suffices for most texts fits in one large page. A build reads as much as there is, in one thread for each
  // core: there a miss costs more than memory.
  static constexpr size_t kShort = 1 << 15;  // 1 MiB
  static constexpr size_t kLong = 1 << 14;   // 1 MiB
  static_assert(kShort * sizeof(ShortEntry) + kLong * sizeof(LongEntry) == LargePages::kSize);
  static constexpr size_t most_bytes(bool is_build) { return is_build ? 16 << 20 : 4 << 20; }  // of one table

  LargePages memory_;
  MemoTable<ShortEntry> short_;
  MemoTable<LongEntry> long_;
  const Vocabulary* vocabulary_;
  Waiting waiting_;
  bool is_right_ = true;
};

// The memos of one encoder, lent to one call at a time: as many exist as calls ever ran at once, kSlots at most
// between calls. No lock, so a fork in the middle of another thread's call leaves nothing locked.
class MemoPool {
 public:
  explicit MemoPool(const Vocabulary* verify_with) : vocabulary_(verify_with) {}
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
    return std::make_unique<SegmentMemo>(vocabulary_);
  }

  void give_back(std::unique_ptr<SegmentMemo> memo) {
    if (!memo->is_right()) return;
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
  const Vocabulary* vocabulary_;
  std::array<std::atomic<SegmentMemo*>, kSlots> slots_{};
};

}  // namespace rwkv
