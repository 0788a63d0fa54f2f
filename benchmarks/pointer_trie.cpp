// The plain way to find the longest token: a node for each prefix with 256 pointers. A peer of bench_tokenizer.py.
#include <cstddef>
#include <cstdint>
#include <memory>

namespace {

struct Node {
  std::unique_ptr<Node> children[256];
  uint16_t id = 0;
};

}  // namespace

extern "C" {

void* trie_new() { return new Node; }

void trie_delete(void* trie) { delete static_cast<Node*>(trie); }

void trie_add(void* trie, const uint8_t* token, size_t size, uint16_t id) {
  Node* node = static_cast<Node*>(trie);
  for (size_t i = 0; i < size; ++i) {
    if (!node->children[token[i]]) node->children[token[i]] = std::make_unique<Node>();
    node = node->children[token[i]].get();
  }
  node->id = id;
}

// Writes at most `size` ids and returns how many.
size_t trie_encode(const void* trie, const uint8_t* text, size_t size, uint16_t* ids) {
  const Node* root = static_cast<const Node*>(trie);
  size_t count = 0;
  for (size_t start = 0; start < size;) {
    const Node* node = root;
    size_t best = 0;
    uint16_t id = 0;
    for (size_t end = start; end < size;) {
      node = node->children[text[end++]].get();
      if (!node) break;
      if (node->id != 0) {
        best = end;
        id = node->id;
      }
    }
    ids[count++] = id;
    start = best;
  }
  return count;
}

}
