// The inner loop for any CPU.
#include <cstring>

#include "tokenizer/segment_loop.h"

namespace rwkv {
namespace {

struct Block {
  uint64_t words[2];

  static Block load(const void* from) {
    Block block;
    std::memcpy(block.words, from, sizeof block.words);
    return block;
  }
  void store(void* to) const { std::memcpy(to, words, sizeof words); }

  uint64_t hash(uint64_t seed) const {
    seed = (seed ^ words[0]) * 0x9E3779B97F4A7C15;
    seed = (seed ^ seed >> 32 ^ words[1]) * 0xC2B2AE3D27D4EB4F;
    return seed ^ seed >> 32;
  }

  Block difference(Block other) const { return {{words[0] ^ other.words[0], words[1] ^ other.words[1]}}; }
  Block meet(Block other) const { return {{words[0] & other.words[0], words[1] & other.words[1]}}; }
  Block join(Block other) const { return {{words[0] | other.words[0], words[1] | other.words[1]}}; }
  bool is_zero() const { return (words[0] | words[1]) == 0; }
};

}  // namespace
}  // namespace rwkv

#include "tokenizer/segment_loop_instance.h"

namespace rwkv {

uint16_t* encode_segments_generic(const MatchCell* cells, SegmentMemo& memo, const Segments& segments, uint16_t* out) {
  return encode_segments(cells, memo, segments, out);
}

}  // namespace rwkv
