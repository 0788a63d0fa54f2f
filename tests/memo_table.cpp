// MemoTable: when it asks to grow, and that what is in it stays in it. Says nothing if all is right.
//
//     program [MEMORY]     with MEMORY bytes of addresses at most: too few to grow
#include <sys/resource.h>

#include <cstdio>
#include <cstdlib>

#include "tokenizer/memo_table.h"

namespace {

struct Entry {
  uint64_t key;
  bool is_used() const { return key != 0; }
};

uint64_t hash(uint64_t key) { return key * 0x9E3779B97F4A7C15 >> 20; }

constexpr size_t kCount = rwkv::LargePages::kSize / 4 / sizeof(Entry);
alignas(64) uint8_t memory[kCount * sizeof(Entry)];

int failures = 0;
void require(bool is_so, const char* what) {
  if (is_so) return;
  ++failures;
  std::printf("%s\n", what);
}

// How many keys are in their place.
size_t count(rwkv::MemoTable<Entry>& table, uint64_t last) {
  size_t found = 0;
  for (uint64_t key = 1; key <= last; ++key) found += table[hash(key)].key == key;
  return found;
}

}  // namespace

int main(int count_arguments, char** arguments) {
  const bool may_grow = count_arguments == 1;
  if (!may_grow) {
    const rlim_t most = std::strtoul(arguments[1], nullptr, 10);
    const rlimit limit{most, most};
    setrlimit(RLIMIT_AS, &limit);
  }
  rwkv::MemoTable<Entry> table(memory, kCount, 4 * rwkv::LargePages::kSize);
  size_t entries = kCount, replaced = 0, asked = 0;
  uint64_t key = 0;
  while (key < 100 * kCount) {
    Entry& entry = table[hash(++key)];
    const bool is_replaced = entry.is_used();
    entry.key = key;
    if (!is_replaced) continue;
    const bool is_time = ++replaced == 2 * entries && asked < (may_grow ? 3 : 1);
    require(table.is_too_small() == is_time, "must ask to grow once two for each entry were replaced");
    if (!is_time) continue;
    const size_t before = count(table, key);
    table.grow(hash);
    require(count(table, key) == before, "must keep what is in it");
    if (may_grow && ++asked < 3) entries *= 4;
    if (!may_grow) asked = 1;
    replaced = 0;
  }
  require(asked == (may_grow ? 3 : 1), "must ask to grow");
  const size_t found = count(table, key);
  require(found > entries * 9 / 10 && found <= entries, "must have become as large as it may");
  return failures != 0;
}
