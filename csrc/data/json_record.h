// A line of JSON to the string under one key of its object.
#pragma once

#include <cstddef>
#include <string_view>

#include "data/growing_bytes.h"

namespace rwkv {

// Reads what is beyond doubt and leaves the rest to a complete parser: whatever is accepted, Python's json.loads reads
// the same. Not accepted although it may be JSON: NaN and Infinity, halves of surrogate pairs in keys and in the text,
// more than 64 levels, numbers of more than 600 characters. For one thread at a time.
class JsonRecord {
 public:
  // use_vectors false: plain C++; the answers are the same.
  explicit JsonRecord(bool use_vectors = true) : use_vectors_(use_vectors) {}

  // Reads the object on the line that `lines` begin with. Sets `text` to the string that its last `key` has, which lies
  // in the line or in memory that lasts until the next call, and takes the line off `lines`, but not its end. False,
  // and `lines` stay, where the line is not accepted. Does not ask whether the line is UTF-8.
  bool read(std::string_view& lines, std::string_view key, std::string_view& text);

 private:
  bool use_vectors_;
  // For unescaped strings. They grow with the string: where that ends nobody knows, and as much as all that follows in
  // the piece would be given back to the system, and its pages filled anew, with every line not accepted.
  GrowingBytes key_;
  GrowingBytes text_;
};

}  // namespace rwkv
