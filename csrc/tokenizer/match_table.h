// The longest token at a position of a text: two bytes at once by a table, the rest by a double array.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "tokenizer/token_list.h"

namespace rwkv {

// All of the table is an array of cells without pointers, so that it can lie in a file:
//   [a | b << 8]        what a text that starts with bytes a, b matches by two bytes at most, and the way on
//   [kByteCells + a]    the id of the single byte a. No way leads on through these: kByteCells is the base of a leaf.
//   [256 k ..), k > 256  nodes of the trie from the third byte on. A node's child by byte c is cell base ^ c if that
//                       has the label c; no two nodes have the same base, so index and label tell the parent.
struct MatchCell {
  uint32_t base;   // where the children are
  uint16_t id;     // of the token that ends here, 0 if none does; in the first 65536 cells never 0
  uint16_t label;  // the byte that leads here, kNoLabel in an unused cell; in the first 65536: bytes matched, 1 or 2
};
static_assert(sizeof(MatchCell) == 8);

constexpr uint32_t kByteCells = 65536;
constexpr uint16_t kNoLabel = 256;

struct Match {
  size_t length;
  uint16_t id;
};

std::vector<MatchCell> build_match_table(const TokenList& tokens);

// The longest token that text[0 .. size) starts with; size >= 1.
inline Match longest_match(const MatchCell* cells, const uint8_t* text, size_t size) {
  if (size < 2) return {1, cells[kByteCells + text[0]].id};
  const MatchCell pair = cells[text[0] | text[1] << 8];
  Match best{pair.label, pair.id};
  uint32_t base = pair.base;
  for (size_t length = 2; length < size; ++length) {
    const uint32_t byte = text[length];
    const MatchCell cell = cells[base ^ byte];
    if (cell.label != byte) break;
    if (cell.id != 0) best = {length + 1, cell.id};
    base = cell.base;
  }
  return best;
}

// The same if no bytes behind the text could make the match longer, else nothing.
std::optional<Match> certain_match(const MatchCell* cells, const uint8_t* text, size_t size);

}  // namespace rwkv
