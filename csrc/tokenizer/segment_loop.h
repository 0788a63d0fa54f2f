// The tokenizer's inner loop: one segment after the other, from the memo if it was seen before.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tokenizer/match_table.h"
#include "tokenizer/segment_memo.h"

namespace rwkv {

// Segments of one text that lie side by side.
struct Segments {
  const uint8_t* begin;  // of the first one
  const uint8_t* base;   // what the ends count from
  const uint16_t* ends;  // [count] behind the last byte of each
  size_t count;
};

// Encodes the segments to `out` and returns the end of the ids. Reads up to 32 bytes from each one's begin and writes
// up to sixteen ids behind the last.
using SegmentLoop = uint16_t* (*)(const MatchCell* cells, SegmentMemo& memo, const Segments& segments, uint16_t* out);

uint16_t* encode_segments_generic(const MatchCell* cells, SegmentMemo& memo, const Segments& segments, uint16_t* out);
#if defined(__x86_64__)
uint16_t* encode_segments_sse42(const MatchCell* cells, SegmentMemo& memo, const Segments& segments, uint16_t* out);
#endif

// The fastest for this CPU. A memo belongs to one of them: they hash differently.
inline SegmentLoop choose_segment_loop(bool use_vectors) {
#if defined(__x86_64__)
  if (use_vectors && __builtin_cpu_supports("sse4.2")) return encode_segments_sse42;
#endif
  (void)use_vectors;
  return encode_segments_generic;
}

}  // namespace rwkv
