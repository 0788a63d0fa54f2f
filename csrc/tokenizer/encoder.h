// Text to token ids: from left to right, always the longest token that matches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "tokenizer/vocabulary.h"

namespace rwkv {

// The only state is the position, so any two encodings that share one token boundary agree after it.
// Immutable after construction: any number of threads may encode with one Encoder.
class Encoder {
 public:
  explicit Encoder(const Vocabulary& vocabulary);

  // Appends the ids of any bytes, UTF-8 or not. Never produces id 0.
  void encode(std::string_view text, std::vector<uint16_t>& ids) const;

 private:
  struct Node {
    uint32_t first_child;  // the children are nodes_[first_child .. first_child + children)
    uint16_t children;
    uint16_t id;  // of the token that ends here, 0 if none does
  };
  struct Match {
    size_t length;
    uint16_t id;
  };

  Match longest_match(const uint8_t* text, size_t size) const;
  uint32_t find_child(const Node& node, uint8_t label) const;  // 0 (the root) where there is none

  std::vector<Node> nodes_;      // breadth first, the root at 0
  std::vector<uint8_t> labels_;  // labels_[i] leads from node i's parent to node i
  std::vector<uint32_t> pairs_;  // [65536] the node reached by two bytes (first * 256 + second), or 0
  std::vector<uint16_t> bytes_;  // [256] the id of each single byte
};

}  // namespace rwkv
