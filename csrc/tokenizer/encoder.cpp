#include "tokenizer/encoder.h"

#include <algorithm>
#include <cstring>

namespace rwkv {

// Breadth first: each node stands for the range of tokens, in byte order, that share its prefix.
Encoder::Encoder(const Vocabulary& vocabulary) : pairs_(65536, 0), bytes_(256, 0) {
  std::vector<uint32_t> order;
  for (uint32_t id = 1; id < kVocabSize; ++id) {
    if (!vocabulary.token(id).empty()) order.push_back(id);
  }
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return vocabulary.token(a) < vocabulary.token(b); });

  struct Range {
    size_t begin, end, depth;
  };
  std::vector<Range> ranges{{0, order.size(), 0}};
  nodes_.push_back({});
  labels_.push_back(0);
  for (size_t node = 0; node < ranges.size(); ++node) {
    auto [begin, end, depth] = ranges[node];
    // The token that is the prefix itself sorts before those it is a prefix of.
    if (begin < end && vocabulary.token(order[begin]).size() == depth) {
      nodes_[node].id = static_cast<uint16_t>(order[begin++]);
    }
    nodes_[node].first_child = static_cast<uint32_t>(nodes_.size());
    while (begin < end) {
      const uint8_t label = static_cast<uint8_t>(vocabulary.token(order[begin])[depth]);
      size_t next = begin + 1;
      while (next < end && static_cast<uint8_t>(vocabulary.token(order[next])[depth]) == label) ++next;
      nodes_.push_back({});
      labels_.push_back(label);
      ranges.push_back({begin, next, depth + 1});
      ++nodes_[node].children;
      begin = next;
    }
  }

  for (uint32_t first = 0; first < 256; ++first) {
    const uint32_t node = find_child(nodes_[0], static_cast<uint8_t>(first));  // every byte is a token
    bytes_[first] = nodes_[node].id;
    for (uint32_t second = 0; second < 256; ++second) {
      pairs_[first * 256 + second] = find_child(nodes_[node], static_cast<uint8_t>(second));
    }
  }
}

uint32_t Encoder::find_child(const Node& node, uint8_t label) const {
  const uint8_t* labels = labels_.data() + node.first_child;
  if (node.children > 8) {
    const void* found = std::memchr(labels, label, node.children);
    return found ? node.first_child + static_cast<uint32_t>(static_cast<const uint8_t*>(found) - labels) : 0;
  }
  for (uint32_t i = 0; i < node.children; ++i) {
    if (labels[i] == label) return node.first_child + i;
  }
  return 0;
}

Encoder::Match Encoder::longest_match(const uint8_t* text, size_t size) const {
  Match best{1, bytes_[text[0]]};
  if (size < 2) return best;
  uint32_t node = pairs_[text[0] * 256u + text[1]];
  for (size_t length = 2; node != 0; ++length) {
    if (nodes_[node].id != 0) best = {length, nodes_[node].id};
    if (length == size) break;
    node = find_child(nodes_[node], text[length]);
  }
  return best;
}

void Encoder::encode(std::string_view text, std::vector<uint16_t>& ids) const {
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  ids.reserve(ids.size() + text.size() / 3);
  for (size_t position = 0; position < text.size();) {
    const Match match = longest_match(bytes + position, text.size() - position);
    ids.push_back(match.id);
    position += match.length;
  }
}

}  // namespace rwkv
