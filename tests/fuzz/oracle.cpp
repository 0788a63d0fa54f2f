#include "oracle.h"

#include <fstream>
#include <iterator>
#include <unordered_map>
#include <unordered_set>

#include "tokenizer/utf8.h"

namespace fuzz {
namespace {

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path.c_str());
    std::exit(1);
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

// Random words of all lengths up to the longest allowed, and runs of one letter.
std::string overlapping_words() {
  std::string text = byte_lines();
  std::unordered_set<std::string> words;
  size_t id = 65535;
  for (const size_t length : {2, 3, 200, 255}) text += line_of(id--, *words.emplace(length, 'a').first);
  uint32_t random = 1;
  while (words.size() < 600) {
    std::string word;
    const size_t length = 2 + words.size() * words.size() % 254;
    while (word.size() < length) {
      random = random * 1664525 + 1013904223;
      word += random >> 28 == 0 ? 'b' : 'a';
    }
    if (words.insert(word).second) text += line_of(id--, word);
  }
  return text;
}

}  // namespace

size_t Input::take() {
  if (bytes_.empty()) return 0;
  const uint8_t byte = static_cast<uint8_t>(bytes_.front());
  bytes_.remove_prefix(1);
  return byte;
}

std::vector<size_t> Input::take_lengths() {
  std::vector<size_t> lengths;
  size_t sum = 0;
  for (size_t count = take() % 16; count > 0; --count) {
    const size_t low = take();
    lengths.push_back(low + 256 * (take() % 16));
    sum += lengths.back();
  }
  if (sum == 0) lengths.push_back(1);
  return lengths;
}

std::string Input::rest(size_t times) const {
  std::string text;
  for (; times > 0; --times) text += bytes_;
  text.shrink_to_fit();
  return text;
}

// All steps from node to node in one hash table.
struct Language::Tree {
  struct Node {
    uint16_t id;  // 0 if no token ends here
    bool has_children;
  };
  std::vector<Node> nodes{Node{}};
  std::unordered_map<size_t, size_t> steps;  // node << 8 | byte -> node

  explicit Tree(const rwkv::Vocabulary& vocabulary) {
    for (size_t id = 1; id < rwkv::kVocabSize; ++id) {
      size_t node = 0;
      for (const char c : vocabulary.token(id)) {
        const auto [step, is_new] = steps.emplace(node << 8 | static_cast<uint8_t>(c), nodes.size());
        nodes[node].has_children = true;
        node = step->second;
        if (is_new) nodes.push_back({});
      }
      if (node != 0) nodes[node].id = static_cast<uint16_t>(id);
    }
  }

  bool step(size_t& node, char byte) const {
    const auto found = steps.find(node << 8 | static_cast<uint8_t>(byte));
    if (found == steps.end()) return false;
    node = found->second;
    return true;
  }
};

Language::Language(const std::string& text)
    : vocabulary(rwkv::Vocabulary::parse(text, "fuzz")),
      encoder(vocabulary),
      plain_encoder(vocabulary, false),
      tree_(new Tree(vocabulary)) {}

Language::~Language() = default;

bool Language::is_unfinished(std::string_view bytes) const {
  size_t node = 0;
  for (const char c : bytes) {
    if (!tree_->step(node, c)) return false;
  }
  return tree_->nodes[node].has_children;
}

std::vector<uint16_t> Language::encode(std::string_view text) const {
  std::vector<uint16_t> ids;
  while (!text.empty()) {
    size_t best = 0, node = 0;
    for (size_t length = 0; length < text.size() && tree_->step(node, text[length]);) {
      ++length;
      const uint16_t id = tree_->nodes[node].id;
      if (id == 0) continue;
      if (best > 0) ids.pop_back();
      ids.push_back(id);
      best = length;
    }
    text.remove_prefix(best);
  }
  return ids;
}

const Language& language(size_t choice) {
  static const Language words(overlapping_words()), world(read_file(RWKV_WORLD));
  return choice % 4 == 3 ? words : world;
}

std::string line_of(size_t id, std::string_view token) {
  std::string line = std::to_string(id) + " b'";
  for (const char c : token) {
    char escape[5];
    std::snprintf(escape, sizeof escape, "\\x%02x", static_cast<unsigned>(static_cast<uint8_t>(c)));
    line += escape;
  }
  return line + "' " + std::to_string(token.size()) + "\n";
}

std::string byte_lines() {
  std::string text;
  for (size_t byte = 0; byte < 256; ++byte) text += line_of(byte + 1, std::string(1, static_cast<char>(byte)));
  return text;
}

bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    const rwkv::Utf8Prefix character = rwkv::read_utf8(text);
    if (!character.complete) return false;
    text.remove_prefix(character.length);
  }
  return true;
}

std::vector<uint16_t> to_vector(const rwkv::IdBuffer& ids) { return {ids.data(), ids.data() + ids.size()}; }

}  // namespace fuzz
