#include "data/document_batch.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "data/json_record.h"
#include "data/utf8_check.h"
#include "tokenizer/decoder.h"

namespace rwkv {
namespace {

constexpr size_t kUsualBytes = 3;  // of a line for each token: room that is not used costs nothing

// Whether the tokens' bytes are the text. A comparison of many bytes at once costs next to nothing beside decoding.
bool decodes_to(const Vocabulary& vocabulary, const uint16_t* ids, const uint16_t* end, std::string_view text) {
  char bytes[1 << 14];
  while (ids != end) {
    const Decoded part = decode_to(vocabulary, ids, static_cast<size_t>(end - ids), bytes, sizeof bytes);
    if (text.substr(0, part.bytes) != std::string_view(bytes, part.bytes)) return false;
    text.remove_prefix(part.bytes);
    ids += part.ids;
  }
  return text.empty();
}

// Texts that are encoded together and then verified together, so that neither's tables push the other's out of the
// cache with every document.
class Documents {
 public:
  static constexpr size_t kTogether = size_t{1} << 19;  // bytes

  Documents(const Encoder& encoder, const BatchOptions& options, DocumentBatch& batch)
      : encoder_(encoder), memo_(encoder), options_(options), batch_(batch) {}

  // Adds the text of a line that begins at `position`; the text must stay until finish().
  void add(std::string_view text, size_t position) {
    if (options_.drop_blank && is_blank(text)) {
      ++batch_.dropped;
      return;
    }
    waiting_.push_back({text, batch_.lines, position, batch_.dropped, 0});
    bytes_ += text.size();
  }

  bool are_enough() const { return bytes_ >= kTogether; }

  // Encodes what was added. False where the ids of a text are not a document's: the batch then ends before it.
  bool finish() {
    size_t first = batch_.ids.size();
    for (Waiting& one : waiting_) {
      encoder_.encode(one.text, batch_.ids, memo_);
      one.end = batch_.ids.size();
      if (!options_.end_of_document) continue;
      uint16_t* end = batch_.ids.room(1);
      *end = 0;
      batch_.ids.set_end(end + 1);
    }
    for (const Waiting& one : waiting_) {
      const uint16_t* ids = batch_.ids.data();
      const size_t size = one.end - first + options_.end_of_document;
      if (size > std::numeric_limits<int32_t>::max() ||
          !decodes_to(encoder_.vocabulary(), ids + first, ids + one.end, one.text)) {
        batch_.ids.set_end(ids + first);
        batch_.lines = one.line;
        batch_.position = one.position;
        batch_.dropped = one.dropped;
        return false;
      }
      batch_.sizes.push_back(static_cast<int32_t>(size));
      batch_.text_bytes += one.text.size();
      first += size;
    }
    waiting_.clear();
    bytes_ = 0;
    return true;
  }

 private:
  struct Waiting {
    std::string_view text;
    size_t line, position, dropped;  // of the batch when it came
    size_t end;                      // of its ids
  };

  const Encoder& encoder_;
  const Encoder::Memo memo_;
  const BatchOptions& options_;
  DocumentBatch& batch_;
  std::vector<Waiting> waiting_;
  size_t bytes_ = 0;
};

bool is_passed_over(std::string_view line) { return line.find_first_not_of(" \t\r") == std::string_view::npos; }

// Bytes at the front of `text` that are one white space character as Python's str.isspace has it; 0 for none.
size_t leading_space(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<uint8_t>(text[i]) : uint8_t{0}; };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return lead == ' ' || (lead >= 0x09 && lead <= 0x0D) || (lead >= 0x1C && lead <= 0x1F) ? 1 : 0;
  if (lead == 0xC2) return byte(1) == 0x85 || byte(1) == 0xA0 ? 2 : 0;
  const uint32_t character = static_cast<uint32_t>(lead << 16 | byte(1) << 8 | byte(2));
  const bool is_space = character == 0xE19A80 || (character >= 0xE28080 && character <= 0xE2808A) ||  // U+2000 to 200A
                        character == 0xE280A8 || character == 0xE280A9 || character == 0xE280AF ||
                        character == 0xE2819F || character == 0xE38080;
  return is_space ? 3 : 0;
}

}  // namespace

bool is_blank(std::string_view text) {
  while (!text.empty()) {
    const size_t space = leading_space(text);
    if (space == 0) return false;
    text.remove_prefix(space);
  }
  return true;
}

DocumentBatch encode_lines(const Encoder& encoder, std::string_view lines, size_t position, std::string_view key,
                           const BatchOptions& options) {
  DocumentBatch batch;
  Documents documents(encoder, options, batch);
  JsonRecord record(options.use_vectors);
  batch.ids.room((lines.size() - position) / kUsualBytes);
  while (position < lines.size()) {
    const char* begin = lines.data() + position;
    const size_t rest = lines.size() - position;
    const void* newline = std::memchr(begin, '\n', rest);
    const size_t length = newline ? static_cast<size_t>(static_cast<const char*>(newline) - begin) : rest;
    const std::string_view line(begin, length);
    std::string_view text;
    if (!is_passed_over(line)) {
      if (!is_utf8(line, options.use_vectors) || !record.read(line, key, text)) break;
      documents.add(text, position);
    }
    ++batch.lines;
    position += std::min(length + 1, rest);
    if (documents.are_enough()) {
      if (!documents.finish()) return batch;
      record.clear();
    }
  }
  if (documents.finish()) batch.position = position;
  return batch;
}

DocumentBatch encode_texts(const Encoder& encoder, std::string_view data, const int64_t* offsets, size_t first,
                           size_t count, const BatchOptions& options) {
  DocumentBatch batch;
  Documents documents(encoder, options, batch);
  for (size_t i = first; i < count; ++i) {
    const auto begin = static_cast<size_t>(offsets[i]);
    const std::string_view text = data.substr(begin, static_cast<size_t>(offsets[i + 1]) - begin);
    if (!is_utf8(text, options.use_vectors)) break;
    documents.add(text, begin);
    ++batch.lines;
    if (documents.are_enough() && !documents.finish()) return batch;
  }
  documents.finish();
  return batch;
}

}  // namespace rwkv
