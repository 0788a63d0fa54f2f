// The tokenizer without Python: encodes the standard input with a compiled vocabulary and decodes the ids again.
//
//     program COMPILED_VOCABULARY THREADS < TEXT > IDS     one id a line
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "tokenizer/batch_encoder.h"
#include "tokenizer/decoder.h"
#include "tokenizer/encoder.h"
#include "tokenizer/vocabulary.h"

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: %s COMPILED_VOCABULARY THREADS\n", arguments[0]), 2;
  std::string text;
  char block[4096];
  while (const size_t size = std::fread(block, 1, sizeof block, stdin)) text.append(block, size);
  try {
    const rwkv::Encoder encoder(rwkv::Vocabulary::map(arguments[1]));  // which keeps the vocabulary
    const rwkv::BatchEncoder batch(encoder, {text}, std::strtoul(arguments[2], nullptr, 10));
    const rwkv::IdBuffer& ids = batch.ids();
    for (size_t i = 0; i < ids.size(); ++i) std::printf("%d\n", ids.data()[i]);
    if (rwkv::decode(encoder.vocabulary(), ids.data(), ids.size()) != text) return 3;
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
}
