#include "tokenizer/vocabulary.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <vector>

namespace rwkv {
namespace {

constexpr char kMagic[8] = {'R', 'W', 'K', 'V', 'v', 'o', 'c', '\n'};
constexpr uint32_t kByteOrder = 0x01020304;
constexpr uint32_t kVersion = 5;

struct Header {
  char magic[8];
  uint32_t byte_order;  // kByteOrder, written as the machine writes its numbers
  uint32_t version;
  uint64_t checksum;  // of all bytes behind it
  uint64_t size;      // of the image
  uint64_t source_size;
  Sha256 source_digest;
  uint32_t cells;
  uint32_t token_bytes;
  uint32_t last_id;
  uint32_t unused;  // 0
};
static_assert(sizeof(Header) == 88);
constexpr size_t kChecked = offsetof(Header, size);  // where the bytes begin that the checksum covers

// Where the tables lie, each at the start of a cache line.
struct Layout {
  size_t boundary_tables, short_tokens, lengths, offsets, cells, token_bytes, size;

  explicit Layout(const Header& header) {
    size_t end = sizeof(Header);
    const auto add = [&](size_t bytes) {
      const size_t begin = (end + 63) / 64 * 64;
      end = begin + bytes;
      return begin;
    };
    boundary_tables = add(sizeof(BoundaryTables));
    short_tokens = add(kVocabSize * sizeof(ShortToken));
    lengths = add(kVocabSize);
    offsets = add((kVocabSize + 1) * sizeof(uint32_t));
    cells = add(header.cells * sizeof(MatchCell));
    token_bytes = add(header.token_bytes);
    size = add(0);
  }
};

// Of the ShortToken of an id.
uint8_t short_length(size_t id, size_t length) {
  const bool is_short = length <= sizeof(ShortToken::bytes) && (length != 0 || id == 0);
  return is_short ? static_cast<uint8_t>(length) : kNotShort;
}

const Header& header_of(const uint8_t* image) { return *reinterpret_cast<const Header*>(image); }

// Any change within one aligned word changes the result for certain: every step is one-to-one in each of its operands.
// Four independent sums, because each waits for its multiplications. `size` is a multiple of 8.
uint64_t checksum(const uint8_t* bytes, size_t size) {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;
  uint64_t sums[4] = {1, 2, 3, 4};
  const auto add = [](uint64_t& sum, uint64_t word) {
    sum = (sum ^ word) * kOdd;
    sum ^= sum >> 32;
  };
  for (size_t i = 0; i < size / 32 * 32; i += 32) {
    uint64_t words[4];
    std::memcpy(words, bytes + i, 32);
    for (size_t lane = 0; lane < 4; ++lane) add(sums[lane], words[lane]);
  }
  for (size_t i = size / 32 * 32; i < size; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    add(sums[0], word);
  }
  uint64_t result = size;
  for (const uint64_t sum : sums) add(result, sum);
  return result;
}

std::string hexadecimal(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

class ImageFile {
 public:
  explicit ImageFile(const std::string& path) : path_(path), file_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (file_ < 0) fail("must be readable, got " + std::string(std::strerror(errno)));
  }
  ~ImageFile() { close(file_); }
  ImageFile(const ImageFile&) = delete;
  ImageFile& operator=(const ImageFile&) = delete;

  std::shared_ptr<const uint8_t> map() {
    struct stat status;
    if (fstat(file_, &status) != 0) fail("must be readable, got " + std::string(std::strerror(errno)));
    size_ = static_cast<size_t>(status.st_size);
    check(size_ >= sizeof(Header), "must have at least " + std::to_string(sizeof(Header)) + " bytes, got " +
                                       std::to_string(size_));
    void* memory = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file_, 0);
    if (memory == MAP_FAILED) fail("must be readable, got " + std::string(std::strerror(errno)));
    const size_t size = size_;
    std::shared_ptr<const uint8_t> image(static_cast<const uint8_t*>(memory),
                                         [size](const uint8_t* begin) { munmap(const_cast<uint8_t*>(begin), size); });
    check_header(header_of(image.get()));
    const uint64_t sum = checksum(image.get() + kChecked, size_ - kChecked);
    const uint64_t recorded = header_of(image.get()).checksum;
    check(sum == recorded, "must have the checksum " + hexadecimal(recorded) + ", got " + hexadecimal(sum));
    check_tables(image.get());
    return image;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::invalid_argument("compiled vocabulary " + path_ + ": " + what +
                                "; make it anew with `make build`, or install rwkv_ext again");
  }
  void check(bool holds, const std::string& what) const {
    if (!holds) fail(what);
  }

  void check_header(const Header& header) const {
    if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) {
      uint64_t start;
      std::memcpy(&start, header.magic, sizeof start);
      fail("must start with 'RWKVvoc', got the bytes " + hexadecimal(__builtin_bswap64(start)));
    }
    check(header.byte_order == kByteOrder, "must have the byte order of this machine, got another");
    check(header.version == kVersion, "must have version " + std::to_string(kVersion) + ", got " +
                                          std::to_string(header.version));
    const size_t size = Layout(header).size;
    check(header.size == size, "must say that it has the " + std::to_string(size) + " bytes of its tables, says " +
                                   std::to_string(header.size));
    check(size_ == size, "must have " + std::to_string(size) + " bytes, got " + std::to_string(size_));
  }

  // That the file was written by another program with a right checksum is no reason to read outside it.
  void check_tables(const uint8_t* image) const {
    const Header& header = header_of(image);
    const Layout layout(header);
    const auto& boundaries = *reinterpret_cast<const BoundaryTables*>(image + layout.boundary_tables);
    const auto* cells = reinterpret_cast<const MatchCell*>(image + layout.cells);
    const auto* offsets = reinterpret_cast<const uint32_t*>(image + layout.offsets);
    const uint8_t* lengths = image + layout.lengths;
    const auto* short_tokens = reinterpret_cast<const ShortToken*>(image + layout.short_tokens);
    check(header.cells >= kByteCells + 256 && header.cells % 256 == 0,
          "must have a multiple of 256 cells, got " + std::to_string(header.cells));
    uint32_t furthest = 0;
    bool is_whole = offsets[0] == 0 && offsets[kVocabSize] == header.token_bytes && header.last_id < kVocabSize;
    for (uint32_t i = 0; i < header.cells; ++i) {
      furthest = std::max(furthest, cells[i].base);
      is_whole &= cells[i].length != 0;
    }
    check(furthest < header.cells, "must have a base below " + std::to_string(header.cells) + " in every cell, got " +
                                       std::to_string(furthest));
    for (size_t id = 0; id < kVocabSize; ++id) {
      is_whole &= offsets[id] <= offsets[id + 1] && offsets[id + 1] - offsets[id] == lengths[id];
      is_whole &= short_tokens[id].length == short_length(id, lengths[id]);
    }
    for (uint32_t pair = 0; pair < kByteCells; ++pair) is_whole &= cells[pair].length <= 2;
    for (const uint8_t is_split : boundaries.splits) is_whole &= is_split <= 1;  // they are summed
    check(is_whole, "must have tables that agree with each other, got others");
  }

  const std::string& path_;
  const int file_;
  size_t size_ = 0;
};

template <typename T>
void put(uint8_t* image, size_t offset, const T* values, size_t count) {
  std::memcpy(image + offset, values, count * sizeof(T));
}

}  // namespace

Vocabulary::Vocabulary(std::shared_ptr<const uint8_t> image) : image_(std::move(image)) {
  const uint8_t* begin = image_.get();
  const Layout layout(header_of(begin));
  boundary_tables_ = reinterpret_cast<const BoundaryTables*>(begin + layout.boundary_tables);
  short_tokens_ = reinterpret_cast<const ShortToken*>(begin + layout.short_tokens);
  lengths_ = begin + layout.lengths;
  offsets_ = reinterpret_cast<const uint32_t*>(begin + layout.offsets);
  cells_ = reinterpret_cast<const MatchCell*>(begin + layout.cells);
  token_bytes_ = reinterpret_cast<const char*>(begin + layout.token_bytes);
}

Vocabulary Vocabulary::parse(std::string_view text, const std::string& name, const Sha256& digest) {
  const TokenList tokens = TokenList::parse(text, name);
  const std::vector<MatchCell> cells = build_match_table(tokens);
  std::vector<uint32_t> offsets(1, 0);
  std::vector<ShortToken> short_tokens(kVocabSize, ShortToken{});
  std::vector<uint8_t> lengths(kVocabSize);
  std::string bytes;
  for (size_t id = 0; id < kVocabSize; ++id) {
    const std::string_view token = tokens.token(id);
    bytes += token;
    offsets.push_back(static_cast<uint32_t>(bytes.size()));
    short_tokens[id].length = short_length(id, token.size());
    if (short_tokens[id].length != kNotShort) token.copy(short_tokens[id].bytes, token.size());
    lengths[id] = static_cast<uint8_t>(token.size());
  }

  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.byte_order = kByteOrder;
  header.version = kVersion;
  header.source_size = text.size();
  header.source_digest = digest;
  header.cells = static_cast<uint32_t>(cells.size());
  header.token_bytes = static_cast<uint32_t>(bytes.size());
  header.last_id = static_cast<uint32_t>(tokens.last_id());
  const Layout layout(header);
  header.size = layout.size;

  auto* image = static_cast<uint8_t*>(std::aligned_alloc(64, layout.size));
  if (!image) throw std::bad_alloc();
  std::shared_ptr<const uint8_t> owner(image, [](const uint8_t* memory) { std::free(const_cast<uint8_t*>(memory)); });
  std::memset(image, 0, layout.size);  // so that the same text always gives the same bytes
  put(image, 0, &header, 1);
  build_boundaries(tokens, *reinterpret_cast<BoundaryTables*>(image + layout.boundary_tables));
  put(image, layout.short_tokens, short_tokens.data(), short_tokens.size());
  put(image, layout.lengths, lengths.data(), lengths.size());
  put(image, layout.offsets, offsets.data(), offsets.size());
  put(image, layout.cells, cells.data(), cells.size());
  put(image, layout.token_bytes, bytes.data(), bytes.size());
  reinterpret_cast<Header*>(image)->checksum = checksum(image + kChecked, layout.size - kChecked);
  return Vocabulary(std::move(owner));
}

Vocabulary Vocabulary::map(const std::string& path) { return Vocabulary(ImageFile(path).map()); }

size_t Vocabulary::last_id() const { return header_of(image_.get()).last_id; }

uint64_t Vocabulary::source_size() const { return header_of(image_.get()).source_size; }

Sha256 Vocabulary::source_digest() const { return header_of(image_.get()).source_digest; }

std::string_view Vocabulary::image() const {
  return {reinterpret_cast<const char*>(image_.get()), static_cast<size_t>(header_of(image_.get()).size)};
}

}  // namespace rwkv
