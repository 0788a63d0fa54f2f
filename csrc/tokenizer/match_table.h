// The longest token at a position of a text: two bytes at once by a table, the rest by a double array.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "tokenizer/token_list.h"

namespace rwkv {

// All of the table is an array of cells without pointers, so that it can lie in a file:
//   [a | b << 8]        what a text that starts with bytes a, b matches by two bytes at most, and the way on
//   [kByteCells + a]    what a text of byte a alone matches. No way leads on through these: kByteCells is a leaf's base
//   [256 k ..), k > 256  nodes of the trie from the third byte on. A node's child by byte c is cell base ^ c if that
//                       has the label c; no two nodes have the same base, so index and label tell the parent.
// Each cell says what is matched when no way leads on from it, so a walk keeps the last cell and asks nothing else.
struct MatchCell {
  uint32_t base;   // where the children are
  uint16_t id;     // of the longest token that ends here or on the way here
  uint8_t label;   // the byte that leads here; in a cell that no byte leads to, one that no walk comes with
  uint8_t length;  // of that token in bytes, never 0
};
static_assert(sizeof(MatchCell) == 8);

constexpr uint32_t kByteCells = 65536;

struct Match {
  size_t length;
  uint16_t id;
};

std::vector<MatchCell> build_match_table(const TokenList& tokens);

// The longest token that text[0 .. size) starts with; size >= 1.
inline Match longest_match(const MatchCell* cells, const uint8_t* text, size_t size) {
  if (size < 2) return {1, cells[kByteCells + text[0]].id};
  MatchCell best = cells[text[0] | text[1] << 8];
  for (size_t length = 2; length < size; ++length) {
    const MatchCell cell = cells[best.base ^ text[length]];
    if (cell.label != text[length]) break;
    best = cell;
  }
  return {std::min<size_t>(best.length, size), best.id};  // whatever table a file holds
}

// The same if no bytes behind the text could make the match longer, else nothing.
std::optional<Match> certain_match(const MatchCell* cells, const uint8_t* text, size_t size);

}  // namespace rwkv
