// The inner loop over a `Block` of sixteen bytes, which the file that includes this has defined: how a CPU reads,
// hashes and compares them.
#include <cstring>

namespace rwkv {
namespace {

inline uint16_t* match_segment(const MatchCell* cells, const uint8_t* text, size_t length, uint16_t* out) {
  for (size_t at = 0; at < length;) {
    const Match match = longest_match(cells, text + at, length - at);
    *out++ = match.id;
    at += match.length;
  }
  return out;
}

template <size_t kBytes>
uint64_t hash_of_key(const SegmentKey<kBytes>& key) {
  uint64_t hash = 0;
  for (size_t i = 0; i < kBytes; i += sizeof(Block)) hash = Block::load(key.bytes + i).hash(hash);
  return hash;
}

// Encodes a segment that was not found and puts it in `entry`. From the key, not from the text, which a careless caller
// may change meanwhile: an entry must never be wrong. Out of line: the loop around it has few registers to spare.
template <typename Entry>
[[gnu::noinline]] uint16_t* add_segment(const MatchCell* cells, SegmentMemo& memo, Entry& entry,
                                        const SegmentKey<Entry::kKeyBytes> key, size_t length, uint16_t* out) {
  uint16_t* const end = match_segment(cells, key.bytes, length, out);
  const auto count = static_cast<size_t>(end - out);
  memo.verify(out, end, key.bytes, length);
  if (count > Entry::kMaxIds) return end;
  const bool is_replaced = entry.is_used();
  entry.key = key;
  std::memcpy(entry.ids, out, count * sizeof(uint16_t));
  entry.count = static_cast<uint16_t>(count);
  if (is_replaced && memo.table<Entry>().is_too_small()) memo.table<Entry>().grow(hash_of_key<Entry::kKeyBytes>);
  return end;
}

// Encodes a segment of at most Entry::kMaxLength bytes, and not so few that another entry would do.
template <typename Entry>
inline uint16_t* recall_segment(const MatchCell* cells, SegmentMemo& memo, const uint8_t* text, size_t length,
                                uint16_t* out) {
  constexpr size_t kBlocks = Entry::kKeyBytes / sizeof(Block);
  constexpr size_t kLast = (kBlocks - 1) * sizeof(Block);
  Block key[kBlocks];
  uint64_t hash = 0;
  for (size_t i = 0; i < kBlocks; ++i) {
    key[i] = Block::load(text + i * sizeof(Block));
    if (i == kBlocks - 1) {  // without what is behind the segment, but with its length
      const Block keep = Block::load(kKeyRows.keep + sizeof(Block) - (length - kLast));
      key[i] = key[i].meet(keep).join(Block::load(kKeyRows.length[length]));
    }
    hash = key[i].hash(hash);
  }
  Entry& entry = memo.table<Entry>()[hash];
  Block difference = key[0].difference(Block::load(entry.key.bytes));
  for (size_t i = 1; i < kBlocks; ++i) {
    difference = difference.join(key[i].difference(Block::load(entry.key.bytes + i * sizeof(Block))));
  }
  if (difference.is_zero()) [[likely]] {
    // All that the entry can hold: what is behind its ids is written over.
    static_assert(sizeof entry.ids + sizeof entry.count == kBlocks * sizeof(Block));
    for (size_t i = 0; i < kBlocks; ++i) {
      Block::load(reinterpret_cast<const uint8_t*>(entry.ids) + i * sizeof(Block)).store(out + 8 * i);
    }
    return out + entry.count;
  }
  SegmentKey<Entry::kKeyBytes> bytes;
  for (size_t i = 0; i < kBlocks; ++i) key[i].store(bytes.bytes + i * sizeof(Block));
  return add_segment(cells, memo, entry, bytes, length, out);
}

// As a SegmentLoop.
inline uint16_t* encode_segments(const MatchCell* cells, SegmentMemo& memo, const Segments& segments, uint16_t* out) {
  const uint8_t* begin = segments.begin;
  for (size_t i = 0; i < segments.count; ++i) {
    const uint8_t* end = segments.base + segments.ends[i];
    const auto length = static_cast<size_t>(end - begin);
    if (length <= ShortEntry::kMaxLength) {
      out = recall_segment<ShortEntry>(cells, memo, begin, length, out);
    } else if (length <= LongEntry::kMaxLength) {
      out = recall_segment<LongEntry>(cells, memo, begin, length, out);
    } else {
      uint16_t* const first = out;
      out = match_segment(cells, begin, length, out);
      memo.verify(first, out, begin, length);
    }
    begin = end;
  }
  return out;
}

}  // namespace
}  // namespace rwkv
