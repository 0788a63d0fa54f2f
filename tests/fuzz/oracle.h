// What the fuzz targets share: the vocabularies, the plainest longest match, and checks that stop the program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/encoder.h"
#include "tokenizer/id_buffer.h"
#include "tokenizer/vocabulary.h"

#define REQUIRE(condition)                                                                \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                       \
    }                                                                                     \
  } while (false)

namespace fuzz {

// An input, read from its front: a few bytes that choose, then what is left.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : bytes_(reinterpret_cast<const char*>(data), size) {}

  size_t take();  // the next byte, 0 behind the end
  // Up to 15 lengths of 0 to 4095, to be used in turn; one of 1 if the input has none.
  std::vector<size_t> take_lengths();
  std::string_view rest() const { return bytes_; }
  // The rest several times: long texts from short inputs. In memory of just that size, so that what is read behind the
  // end is seen.
  std::string rest(size_t times) const;

 private:
  std::string_view bytes_;
};

// A vocabulary with what the oracle knows of it.
class Language {
 public:
  explicit Language(const std::string& text);
  ~Language();

  // Whether some token is longer and starts so.
  bool is_unfinished(std::string_view bytes) const;
  std::vector<uint16_t> encode(std::string_view text) const;

  const rwkv::Vocabulary vocabulary;
  const rwkv::Encoder encoder, plain_encoder;  // plain: without vector code

 private:
  struct Tree;
  const std::unique_ptr<const Tree> tree_;
};

// The World vocabulary, or one in four times words of two letters that overlap in every way.
const Language& language(size_t choice);

std::string line_of(size_t id, std::string_view token);  // of a vocabulary's file
std::string byte_lines();                                // those of all bytes, which every vocabulary must have

bool is_utf8(std::string_view text);
std::vector<uint16_t> to_vector(const rwkv::IdBuffer& ids);

}  // namespace fuzz
