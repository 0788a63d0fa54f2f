// Encoded documents back to back, as a shard holds them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "data/line_reader.h"
#include "tokenizer/encoder.h"
#include "tokenizer/id_buffer.h"

namespace rwkv {

struct BatchOptions {
  bool end_of_document;  // token 0 behind each document
  bool drop_blank;       // leave out documents of white space alone
  bool use_vectors;
};

struct DocumentBatch {
  IdBuffer ids;
  std::vector<int32_t> sizes;  // in tokens, with the end of document
  size_t text_bytes = 0;
  size_t dropped = 0;  // blank documents
  size_t lines = 0;    // or texts: how many were read, with the blank and the empty ones
};

// Encodes lines, JSON objects with a string under `key`, and passes them, until the first that JsonRecord does not
// accept or that is not UTF-8. Lines of spaces, tabs and carriage returns are passed over. There is room at first for
// the ids of `expected_bytes` of lines.
DocumentBatch encode_lines(const Encoder& encoder, LineReader& reader, std::string_view key,
                           const BatchOptions& options, size_t expected_bytes);

// Encodes the texts data[offsets[i] .. offsets[i + 1]) for i from `first` to count - 1, until the first that is not
// UTF-8. Offsets must ascend and stay in `data`.
DocumentBatch encode_texts(const Encoder& encoder, std::string_view data, const int64_t* offsets, size_t first,
                           size_t count, const BatchOptions& options);

// Whether Python's str.isspace holds for the whole of a text in UTF-8, or the text is empty.
bool is_blank(std::string_view text);

}  // namespace rwkv
