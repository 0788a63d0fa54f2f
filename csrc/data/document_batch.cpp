#include "data/document_batch.h"

#include <limits>

#include "data/json_record.h"
#include "data/utf8_check.h"

namespace rwkv {
namespace {

constexpr size_t kUsualBytes = 2;  // of a line for each token

// Adds texts to a batch.
class Documents {
 public:
  Documents(const Encoder& encoder, const BatchOptions& options, DocumentBatch& batch)
      : encoder_(encoder), memo_(encoder, true), options_(options), batch_(batch) {}

  // False, and nothing added, if the ids are not a document's.
  bool add(std::string_view text) {
    if (options_.drop_blank && is_blank(text)) {
      ++batch_.dropped;
      return true;
    }
    IdBuffer& ids = batch_.ids;
    const size_t first = ids.size();
    encoder_.encode(text, ids, memo_);
    const size_t size = ids.size() - first + options_.end_of_document;
    if (!memo_.is_right() || size > std::numeric_limits<int32_t>::max()) {
      ids.set_end(ids.data() + first);
      return false;
    }
    if (options_.end_of_document) {
      uint16_t* end = ids.room(1);
      *end = 0;
      ids.set_end(end + 1);
    }
    batch_.sizes.push_back(static_cast<int32_t>(size));
    batch_.text_bytes += text.size();
    return true;
  }

 private:
  const Encoder& encoder_;
  const Encoder::Memo memo_;
  const BatchOptions& options_;
  DocumentBatch& batch_;
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

DocumentBatch encode_lines(const Encoder& encoder, LineReader& reader, std::string_view key,
                           const BatchOptions& options, size_t expected_bytes) {
  DocumentBatch batch;
  Documents documents(encoder, options, batch);
  JsonRecord record(options.use_vectors);
  batch.ids.reserve(expected_bytes / kUsualBytes);
  for (std::string_view lines; !(lines = reader.lines()).empty();) {
    // A record is read to where its line ends, not to an end that would have to be looked for first.
    std::string_view rest = lines, text;
    if (record.read(rest, key, text)) {
      const std::string_view line = lines.substr(0, lines.size() - rest.size());
      if (!is_utf8(line, options.use_vectors) || !documents.add(text)) break;
    } else {
      const std::string_view line = rest.substr(0, rest.find('\n'));
      if (!is_passed_over(line)) break;
      rest.remove_prefix(line.size());
    }
    ++batch.lines;
    reader.pass(lines.size() - rest.size() + !rest.empty());
  }
  return batch;
}

DocumentBatch encode_texts(const Encoder& encoder, std::string_view data, const int64_t* offsets, size_t first,
                           size_t count, const BatchOptions& options) {
  DocumentBatch batch;
  Documents documents(encoder, options, batch);
  for (size_t i = first; i < count; ++i) {
    const auto begin = static_cast<size_t>(offsets[i]);
    const std::string_view text = data.substr(begin, static_cast<size_t>(offsets[i + 1]) - begin);
    if (!is_utf8(text, options.use_vectors) || !documents.add(text)) break;
    ++batch.lines;
  }
  return batch;
}

}  // namespace rwkv
