#include "tokenizer/encoder.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <optional>

namespace rwkv {
namespace {

constexpr size_t kBlock = 64;         // bytes whose boundaries are found at once
constexpr size_t kReadAhead = 80;     // bytes that may be read behind the end of a segment or block
constexpr size_t kPiece = 64 * 1024;  // bytes between two looks at the room for ids
constexpr size_t kLongSegment = 1024;  // bytes without a boundary
constexpr size_t kLastBytes = 256;
constexpr size_t kSlack = 16;  // ids

}  // namespace

Encoder::Encoder(const Vocabulary& vocabulary, bool use_vectors)
    : vocabulary_(vocabulary),
      cells_(vocabulary_.cells()),
      boundaries_(vocabulary_.boundary_tables(), use_vectors) {}

// Encodes at least up to `end` with tokens that end at or before `limit`.
inline void Encoder::match_tokens(Run& run, size_t end, size_t limit) const {
  while (run.start < end) {
    const Match match = longest_match(cells_, run.text + run.start, limit - run.start);
    *run.out++ = match.id;
    run.start += match.length;
  }
}

// Encodes up to the boundary `end`, at most Entry::kMaxBytes away, with the memo.
template <typename Entry>
inline void Encoder::recall_segment(Run& run, size_t end) const {
  const size_t length = end - run.start;
  decltype(Entry::bytes) bytes;
  Entry& entry = run.memo.find<Entry>(run.text + run.start, length, bytes);
  uint64_t difference = entry.length ^ length;
  for (size_t i = 0; i < std::size(bytes); ++i) difference |= entry.bytes[i] ^ bytes[i];
  if (difference == 0) {
    // All the entry can hold, and its last two bytes, in one store: what is behind the ids is written over.
    std::memcpy(run.out, reinterpret_cast<const uint8_t*>(&entry) + sizeof bytes, sizeof entry - sizeof bytes);
    run.out += entry.count;
    run.start = end;
    return;
  }
  const uint16_t* first = run.out;
  // From a copy, not from the text, which a careless caller may change meanwhile: an entry must never be wrong.
  uint8_t copy[sizeof bytes];
  std::memcpy(copy, bytes, sizeof bytes);
  for (size_t at = 0; at < length;) {
    const Match match = longest_match(cells_, copy + at, length - at);
    *run.out++ = match.id;
    at += match.length;
  }
  run.start = end;
  const size_t count = static_cast<size_t>(run.out - first);
  if (count > Entry::kMaxIds) return;
  std::memcpy(entry.bytes, bytes, sizeof bytes);
  std::memcpy(entry.ids, first, count * sizeof(uint16_t));
  entry.length = static_cast<uint8_t>(length);
  entry.count = static_cast<uint8_t>(count);
}

// Encodes up to the boundary `end`. Reads up to 32 bytes from the segment's start.
inline void Encoder::encode_segment(Run& run, size_t end) const {
  const size_t length = end - run.start;
  if (length - 1 < ShortEntry::kMaxBytes) return recall_segment<ShortEntry>(run, end);
  if (length - 1 < LongEntry::kMaxBytes) return recall_segment<LongEntry>(run, end);
  match_tokens(run, end, end);
}

// Encodes the segments that end at or before `end`. Reads up to kReadAhead bytes behind it.
void Encoder::encode_segments(Run& run, size_t end) const {
  for (size_t block = run.start; block < end; block += kBlock) {
    uint64_t boundaries = boundaries_.find(run.text + block);
    if (end - block < kBlock) boundaries &= (uint64_t{1} << (end - block)) - 1;
    for (; boundaries != 0; boundaries &= boundaries - 1) {
      encode_segment(run, block + static_cast<size_t>(__builtin_ctzll(boundaries)) + 1);
    }
    // What no boundary cuts, such as a run of spaces, goes token by token, so that little is ever left open.
    if (block + kBlock - run.start > kLongSegment && block + kBlock > run.start) match_tokens(run, block, run.size);
  }
}

// Encodes the segments that end at or before `last`, which is at least kReadAhead bytes from the text's end.
void Encoder::encode_pieces(Run& run, size_t last, IdBuffer& ids) const {
  while (run.start < last) {
    // A token that starts in this piece ends within kMaxTokenBytes of it.
    const size_t begin = run.start;
    const size_t end = std::min(last, begin + kPiece);
    run.out = ids.room(end - begin + kMaxTokenBytes + kSlack);
    encode_segments(run, end);
    ids.set_end(run.out);
    if (end == last) break;
  }
}

size_t Encoder::find_boundary(std::string_view text, size_t start) const {
  const uint8_t(&splits)[65536] = vocabulary_.boundary_tables().splits;
  for (size_t end = std::max<size_t>(start, 1); end < text.size(); ++end) {
    if (splits[static_cast<uint8_t>(text[end - 1]) | static_cast<uint8_t>(text[end]) << 8]) return end;
  }
  return text.size();
}

size_t Encoder::encode_certain(std::string_view text, IdBuffer& ids) const {
  static_assert(kMaxTokenBytes >= kReadAhead);
  const Memo memo(*this);
  Run run{reinterpret_cast<const uint8_t*>(text.data()), text.size(), 0, nullptr, *memo.memo_};
  // Where the longest token would fit, the text's end cuts off no match.
  encode_pieces(run, text.size() > kMaxTokenBytes ? text.size() - kMaxTokenBytes : 0, ids);
  run.out = ids.room(run.size - run.start + kSlack);
  while (run.start < run.size) {
    const std::optional<Match> match = certain_match(cells_, run.text + run.start, run.size - run.start);
    if (!match) break;
    *run.out++ = match->id;
    run.start += match->length;
  }
  ids.set_end(run.out);
  return run.start;
}

void Encoder::encode(std::string_view text, IdBuffer& ids, const Memo& memo) const {
  Run run{reinterpret_cast<const uint8_t*>(text.data()), text.size(), 0, nullptr, *memo.memo_};
  encode_pieces(run, text.size() > kReadAhead ? text.size() - kReadAhead : 0, ids);

  // The rest is copied to where bytes behind it may be read, if it is as short as it nearly always is.
  const size_t rest = run.size - run.start;
  run.out = ids.room(rest + kSlack);
  if (rest > kLastBytes) {
    match_tokens(run, run.size, run.size);
    ids.set_end(run.out);
  } else if (rest > 0) {
    uint8_t copy[kLastBytes + kReadAhead] = {};
    std::memcpy(copy, run.text + run.start, rest);
    Run last_run{copy, rest, 0, run.out, *memo.memo_};
    encode_segments(last_run, rest - 1);
    encode_segment(last_run, rest);
    ids.set_end(last_run.out);
  }
}

}  // namespace rwkv
