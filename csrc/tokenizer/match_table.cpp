#include "tokenizer/match_table.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

namespace rwkv {
namespace {

struct Trie {
  struct Node {
    uint32_t first_child;  // the children are nodes[first_child .. first_child + children), by label
    uint16_t children;
    uint16_t id;  // of the token that ends here, 0 if none does
  };
  std::vector<Node> nodes;      // breadth first, the root at 0
  std::vector<uint8_t> labels;  // labels[i] leads from node i's parent to node i
};

std::vector<uint16_t> sort_ids_by_bytes(const TokenList& tokens) {
  // The first eight bytes as one number decide nearly every comparison.
  std::vector<std::pair<uint64_t, uint16_t>> order;
  order.reserve(kVocabSize);
  for (size_t id = 1; id < kVocabSize; ++id) {
    const std::string_view token = tokens.token(id);
    if (token.empty()) continue;
    uint64_t head = 0;
    for (size_t i = 0; i < 8; ++i) head = head << 8 | (i < token.size() ? static_cast<uint8_t>(token[i]) : 0);
    order.emplace_back(head, static_cast<uint16_t>(id));
  }
  std::sort(order.begin(), order.end(), [&](const auto& a, const auto& b) {
    return a.first != b.first ? a.first < b.first : tokens.token(a.second) < tokens.token(b.second);
  });
  std::vector<uint16_t> ids;
  ids.reserve(order.size());
  for (const auto& entry : order) ids.push_back(entry.second);
  return ids;
}

// Breadth first: each node stands for the range of tokens, in byte order, that share its prefix.
Trie build_trie(const TokenList& tokens) {
  const std::vector<uint16_t> order = sort_ids_by_bytes(tokens);
  struct Range {
    size_t begin, end, depth;
  };
  std::vector<Range> ranges{{0, order.size(), 0}};
  Trie trie{{{}}, {0}};
  for (size_t node = 0; node < ranges.size(); ++node) {
    auto [begin, end, depth] = ranges[node];
    // The token that is the prefix itself sorts before those it is a prefix of.
    if (begin < end && tokens.token(order[begin]).size() == depth) trie.nodes[node].id = order[begin++];
    trie.nodes[node].first_child = static_cast<uint32_t>(trie.nodes.size());
    while (begin < end) {
      const uint8_t label = static_cast<uint8_t>(tokens.token(order[begin])[depth]);
      size_t next = begin + 1;
      while (next < end && static_cast<uint8_t>(tokens.token(order[next])[depth]) == label) ++next;
      trie.nodes.push_back({});
      trie.labels.push_back(label);
      ranges.push_back({begin, next, depth + 1});
      ++trie.nodes[node].children;
      begin = next;
    }
  }
  return trie;
}

using Bits = std::array<uint64_t, 4>;  // one bit for each of a block's 256 cells

// The bits b for which bit b ^ label of `bits` is set.
Bits permuted(const Bits& bits, uint32_t label) {
  constexpr uint64_t kLower[6] = {0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F,
                                  0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF};
  Bits result;
  for (uint32_t word = 0; word < 4; ++word) {
    uint64_t x = bits[word ^ label >> 6];
    for (uint32_t k = 0; k < 6; ++k) {
      if (label >> k & 1) x = (x >> (1u << k) & kLower[k]) | (x & kLower[k]) << (1u << k);
    }
    result[word] = x;
  }
  return result;
}

// Finds a base for each node's children: first fit over blocks of 256 cells, all bases of a block tried at once.
class Placement {
 public:
  // Considers every block again that has room. Without it, a block that refused several nodes is passed over.
  void reopen() {
    open_.clear();
    for (uint32_t block = 0; block < blocks_.size(); ++block) {
      blocks_[block].refusals = 0;
      if (blocks_[block].unused != 0) open_.push_back(block);
    }
  }

  // A base no other node has, where the cells of all labels are unused; they are used from now on.
  uint32_t place(const uint8_t* labels, size_t count) {
    size_t kept = 0;  // closed blocks drop out of the list as it is walked
    for (size_t i = 0; i < open_.size(); ++i) {
      const uint32_t block = open_[i];
      const int base = try_block(blocks_[block], labels, count);
      const bool is_closed = blocks_[block].unused == 0 || blocks_[block].refusals >= kMaxRefusals;
      if (!is_closed) open_[kept++] = block;
      if (base < 0) continue;
      open_.erase(open_.begin() + static_cast<std::ptrdiff_t>(kept),
                  open_.begin() + static_cast<std::ptrdiff_t>(i + 1));
      return first_cell(block) + static_cast<uint32_t>(base);
    }
    open_.resize(kept);
    open_.push_back(static_cast<uint32_t>(blocks_.size()));
    blocks_.emplace_back();
    return first_cell(open_.back()) + static_cast<uint32_t>(try_block(blocks_.back(), labels, count));
  }

  size_t cells() const { return first_cell(static_cast<uint32_t>(blocks_.size())); }

  // Fills each block with cells that no node's child by their label would be in: the label of an unused cell is the
  // way to it from a base that no node has. There is one, for each node with a base in the block has a child there.
  void label_unused(std::vector<MatchCell>& cells) const {
    for (uint32_t block = 0; block < blocks_.size(); ++block) {
      if (blocks_[block].unused == 0) continue;
      const Bits& free = blocks_[block].free_bases;
      uint32_t base = 0;
      while ((free[base / 64] >> base % 64 & 1) == 0) ++base;
      for (uint32_t cell = 0; cell < 256; ++cell) {
        cells[first_cell(block) + cell] = {kByteCells, 0, static_cast<uint8_t>(cell ^ base), 1};
      }
    }
  }

 private:
  static constexpr uint32_t kMaxRefusals = 16;

  struct Block {
    Bits free{~0ull, ~0ull, ~0ull, ~0ull};
    Bits free_bases{~0ull, ~0ull, ~0ull, ~0ull};
    uint32_t unused = 256;
    uint32_t refusals = 0;
  };

  static uint32_t first_cell(uint32_t block) { return kByteCells + 256 * (block + 1); }

  // The base within the block, or -1.
  static int try_block(Block& block, const uint8_t* labels, size_t count) {
    Bits fits = block.free_bases;
    for (size_t i = 0; i < count; ++i) {
      const Bits free = permuted(block.free, labels[i]);
      for (size_t word = 0; word < 4; ++word) fits[word] &= free[word];
    }
    for (uint32_t word = 0; word < 4; ++word) {
      if (fits[word] == 0) continue;
      const uint32_t base = 64 * word + static_cast<uint32_t>(__builtin_ctzll(fits[word]));
      block.free_bases[word] &= ~(1ull << base % 64);
      for (size_t i = 0; i < count; ++i) {
        const uint32_t cell = base ^ labels[i];
        block.free[cell / 64] &= ~(1ull << cell % 64);
      }
      block.unused -= static_cast<uint32_t>(count);
      return static_cast<int>(base);
    }
    ++block.refusals;
    return -1;
  }

  std::vector<Block> blocks_;
  std::vector<uint32_t> open_;
};

// bases[node], kByteCells for leaves, and cells with the labels of unused ones. Nodes with many children come first;
// those with one fill every hole.
std::vector<uint32_t> place_nodes(const Trie& trie, size_t first_node, std::vector<MatchCell>& cells) {
  std::vector<uint32_t> bases(trie.nodes.size(), kByteCells);
  std::vector<uint32_t> order(trie.nodes.size() - first_node);
  std::iota(order.begin(), order.end(), static_cast<uint32_t>(first_node));
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return trie.nodes[a].children > trie.nodes[b].children; });
  Placement placement;
  bool is_single = false;
  for (const uint32_t node : order) {
    const Trie::Node& parent = trie.nodes[node];
    if (parent.children == 0) break;
    if (parent.children == 1 && !std::exchange(is_single, true)) placement.reopen();
    bases[node] = placement.place(trie.labels.data() + parent.first_child, parent.children);
  }
  cells.resize(placement.cells());
  placement.label_unused(cells);
  return bases;
}

}  // namespace

std::vector<MatchCell> build_match_table(const TokenList& tokens) {
  const Trie trie = build_trie(tokens);
  const Trie::Node& root = trie.nodes[0];
  const size_t first_pair = root.first_child + root.children;  // the first node of two bytes
  std::vector<MatchCell> cells;
  const std::vector<uint32_t> bases = place_nodes(trie, first_pair, cells);

  // The cell of each node, for its children to take what it matches from.
  std::vector<uint32_t> cell_of(trie.nodes.size());
  for (uint32_t first = 0; first < 256; ++first) {  // every byte is a token
    const Trie::Node& node = trie.nodes[root.first_child + first];
    const MatchCell byte{kByteCells, node.id, static_cast<uint8_t>(~first), 1};
    cells[kByteCells + first] = byte;
    for (uint32_t second = 0; second < 256; ++second) cells[first | second << 8] = byte;
    for (uint32_t i = node.first_child; i < node.first_child + node.children; ++i) {
      cell_of[i] = first | static_cast<uint32_t>(trie.labels[i]) << 8;
      MatchCell& pair = cells[cell_of[i]];
      pair.base = bases[i];
      if (trie.nodes[i].id != 0) pair = {bases[i], trie.nodes[i].id, pair.label, 2};
    }
  }
  for (size_t parent = first_pair; parent < trie.nodes.size(); ++parent) {
    const Trie::Node& node = trie.nodes[parent];
    for (uint32_t i = node.first_child; i < node.first_child + node.children; ++i) {
      const uint8_t label = trie.labels[i];
      cell_of[i] = bases[parent] ^ label;
      const MatchCell& before = cells[cell_of[parent]];
      const uint16_t id = trie.nodes[i].id;
      const uint8_t length = id != 0 ? static_cast<uint8_t>(tokens.token(id).size()) : before.length;
      cells[cell_of[i]] = {bases[i], id != 0 ? id : before.id, label, length};
    }
  }
  return cells;
}

namespace {

bool starts_longer_token(const MatchCell* cells, uint32_t byte) {
  for (uint32_t second = 0; second < 256; ++second) {
    const MatchCell& pair = cells[byte | second << 8];
    if (pair.length == 2 || pair.base != kByteCells) return true;
  }
  return false;
}

}  // namespace

std::optional<Match> certain_match(const MatchCell* cells, const uint8_t* text, size_t size) {
  const Match match = longest_match(cells, text, size);
  if (size >= kMaxTokenBytes) return match;  // the walk has ended, whatever table a file holds
  if (size == 1) return starts_longer_token(cells, text[0]) ? std::nullopt : std::make_optional(match);
  uint32_t base = cells[text[0] | text[1] << 8].base;
  for (size_t length = 2; length < size; ++length) {
    const MatchCell& cell = cells[base ^ text[length]];
    if (cell.label != text[length]) return match;
    base = cell.base;
  }
  return base == kByteCells ? std::make_optional(match) : std::nullopt;  // at a leaf no way leads on
}

}  // namespace rwkv
