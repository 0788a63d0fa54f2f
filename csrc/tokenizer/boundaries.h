// Positions where a token must end: between two bytes that stand side by side inside no token.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tokenizer/token_list.h"

namespace rwkv {

// Plain data. The classes know fewer boundaries than the table of pairs, and no other ones: each byte is of one of 64
// classes, eight to a plane.
struct BoundaryTables {
  static constexpr size_t kPlanes = 8;
  uint8_t splits[65536];         // [a | b << 8] is 1 if a token must end between bytes a and b, else 0
  uint8_t before[kPlanes][256];  // one bit in one plane: the class of byte a. ASCII: in the first plane
  uint8_t behind[kPlanes][256];  // the classes of which some byte stands before b in a token
  // [a] is 1 if no token goes on with another character behind one of three bytes that starts with byte a: Chinese
  // letters, of which pairs of bytes do not tell, for other letters end as they do.
  uint8_t alone[256];
};

// Fills zeroed tables.
void build_boundaries(const TokenList& tokens, BoundaryTables& tables);

// A text cut at such positions encodes piece by piece to what the whole gives. Most pairs of bytes never meet inside
// a World token (57,203 of 65,536; a letter and a space, say), so pieces are about as long as words.
class Boundaries {
 public:
  // Keeps a reference to the tables. use_vectors false leaves out what this CPU could do beyond plain C++; what find()
  // may miss differs.
  Boundaries(const BoundaryTables& tables, bool use_vectors);

  // Writes positions in text[1 .. size], size < 65536, where a token must end, in ascending order; returns how many:
  // not all that there are. Reads up to 66 bytes behind the text, writes up to 64 numbers behind the last.
  size_t find(const uint8_t* text, size_t size, uint16_t* ends) const { return find_(*tables_, text, size, ends); }

 private:
  const BoundaryTables* tables_;
  size_t (*find_)(const BoundaryTables&, const uint8_t*, size_t, uint16_t*);
};

}  // namespace rwkv
