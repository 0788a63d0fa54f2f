#include "tokenizer/encoder.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace rwkv {
namespace {

constexpr size_t kReadAhead = 80;      // bytes that may be read behind the last boundary that is asked for
constexpr size_t kEndsSlack = 64;      // numbers
constexpr size_t kPiece = 4096;        // bytes whose boundaries are found before they are used
constexpr size_t kLongSegment = 1024;  // bytes without a boundary
constexpr size_t kLastBytes = 256;
constexpr size_t kSlack = 16;  // ids
constexpr size_t kLongText = 512 * 1024;  // bytes, of which kSamples times kSample say how many ids there are
constexpr size_t kSamples = 8;
constexpr size_t kSample = 1024;

}  // namespace

Encoder::Encoder(const Vocabulary& vocabulary, bool use_vectors)
    : vocabulary_(vocabulary),
      cells_(vocabulary_.cells()),
      boundaries_(vocabulary_.boundary_tables(), use_vectors),
      segment_loop_(choose_segment_loop(use_vectors)) {
  const Memo first(*this);  // is there from now on, so that no text waits for it
}

// Encodes at least up to `end` with tokens that end at or before `limit`.
inline void Encoder::match_tokens(Run& run, size_t end, size_t limit) const {
  const uint16_t* const first = run.out;
  const size_t begin = run.start;
  while (run.start < end) {
    const Match match = longest_match(cells_, run.text + run.start, limit - run.start);
    *run.out++ = match.id;
    run.start += match.length;
  }
  run.memo.verify(first, run.out, run.text + begin, run.start - begin);
}

// Encodes the segments that end at or before `last`, which is at least kReadAhead bytes from the text's end.
void Encoder::encode_pieces(Run& run, size_t last, IdBuffer& ids) const {
  uint16_t ends[kPiece + kEndsSlack];
  for (size_t piece = run.start; piece < last;) {
    const size_t end = std::min(last, piece + kPiece);
    // A token that starts in this piece ends within kMaxTokenBytes of it.
    run.out = ids.room(end - run.start + kMaxTokenBytes + kSlack);
    encode_segments(run, piece, end, ends);
    // What no boundary cuts, such as a run of spaces, goes token by token, so that little is ever left open.
    if (end > run.start + kLongSegment) match_tokens(run, end, run.size);
    ids.set_end(run.out);
    piece = std::max(end, run.start);
  }
}

// Encodes the segments that end in text[piece + 1 .. end], where `ends` has room for as many and kEndsSlack more.
void Encoder::encode_segments(Run& run, size_t piece, size_t end, uint16_t* ends) const {
  const uint8_t* base = run.text + piece;
  const size_t count = boundaries_.find(base, end - piece, ends);
  if (count == 0) return;
  run.out = segment_loop_(cells_, run.memo, {run.text + run.start, base, ends, count}, run.out);
  run.start = piece + ends[count - 1];
}

size_t Encoder::expected_ids(const std::vector<std::string_view>& texts) const {
  size_t all = 0;
  for (const std::string_view text : texts) all += text.size();
  if (all < kLongText) return rwkv::expected_ids(all);

  const Memo memo(*this);
  IdBuffer ids;
  size_t sampled = 0, next = 0, begin = 0;  // of the text among all
  for (const std::string_view text : texts) {
    for (; next < begin + text.size(); next += all / kSamples) {
      const std::string_view sample = text.substr(next - begin, kSample);
      encode(sample, ids, memo);
      sampled += sample.size();
    }
    begin += text.size();
  }
  const double ids_per_byte = static_cast<double>(ids.size()) / static_cast<double>(sampled);
  return static_cast<size_t>(1.1 * ids_per_byte * static_cast<double>(all)) + rwkv::expected_ids(0);
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
    uint16_t ends[kLastBytes + kEndsSlack];
    encode_segments(last_run, 0, rest - 1, ends);
    const uint16_t end = static_cast<uint16_t>(rest);
    last_run.out = segment_loop_(cells_, last_run.memo, {copy + last_run.start, copy, &end, 1}, last_run.out);
    ids.set_end(last_run.out);
  }
}

}  // namespace rwkv
