// Lines, many at a time, of a file or of memory.
#pragma once

#include <cstddef>
#include <string_view>

#include "data/growing_bytes.h"

namespace rwkv {

// A file is read a block at a time, which takes as much memory, or up to half as much again as the longest line.
class LineReader {
 public:
  // The lines of memory that outlives the reader.
  explicit LineReader(std::string_view lines) : end_(lines.size()), lines_(lines), is_done_(true) {}

  // Those of an open file that begin at its bytes begin .. end, of which the last may go on behind `end`. `begin` must
  // be where one begins, and `block` is in bytes, at least one.
  LineReader(int file, size_t begin, size_t end, size_t block)
      : file_(file), block_(block), position_(begin), end_(end), is_done_(begin >= end) {}

  // Whole lines from position() on, at least one: the file's last may be without its line end. None behind the last
  // line, nor where the file ends before `end`. They stay where they are until all of them are passed. Throws
  // std::system_error for a file that cannot be read.
  std::string_view lines() {
    while (lines_.empty() && !is_done_) read();
    return lines_;
  }
  // Leaves out the first `bytes` of lines().
  void pass(size_t bytes) {
    lines_.remove_prefix(bytes);
    position_ += bytes;
  }

  size_t position() const { return position_; }  // in the file, or the memory
  size_t end() const { return end_; }

 private:
  void read();

  int file_ = -1;
  size_t block_ = 0;
  size_t position_ = 0;
  size_t end_;
  GrowingBytes buffer_;  // lines_, then the front of a line
  size_t front_ = 0;     // where that begins
  size_t filled_ = 0;    // where it ends
  std::string_view lines_;
  bool is_done_;  // nothing is left to be read
};

}  // namespace rwkv
