#include "shared_memory.h"

#include <sys/mman.h>

#include <map>

#include "unseen.h"

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#else
static void __asan_poison_memory_region(const void*, size_t) {}
static void __asan_unpoison_memory_region(const void*, size_t) {}
#endif

namespace emulator {
namespace {

constexpr int64_t kGuard = 256;        // bytes before and after each buffer
constexpr int kAlignment = 128;        // of the whole shared memory, so of offset 0
constexpr unsigned char kGuardByte = 0xfe;
constexpr int64_t kMostBuffers = 64;

struct Buffer {
  char* memory;
  int64_t bytes;
  Location where;
};

char* memory = nullptr;
int64_t memory_bytes = 0;
int64_t used = 0;
int shared_limit = 0;
std::map<int, Buffer> buffers;  // by offset

void fill(char* from, int64_t bytes, unsigned char value) {
  for (volatile char* byte = from; byte < from + bytes; ++byte) *byte = static_cast<char>(value);
}

void check_guard(const Buffer& buffer, int offset, const char* guard) {
  for (int64_t i = 0; i < kGuard; ++i)
    if (static_cast<unsigned char>(guard[i]) != kGuardByte)
      fail("overrun: the block wrote outside the shared buffer of ", buffer.bytes, " bytes at offset ", offset,
           ", declared at ", text_of(buffer.where), ", ",
           guard + i - buffer.memory, " bytes from its start");
}

}  // namespace

void begin_shared_memory(int shared_bytes) {
  // Mapped anew for each block: ThreadSanitizer then forgets the accesses of the block before.
  memory_bytes = shared_bytes + kMostBuffers * (2 * kGuard + kAlignment);
  void* mapped = mmap(nullptr, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) fail("no memory for ", shared_bytes, " bytes of shared memory");
  memory = static_cast<char*>(mapped);
  fill(memory, memory_bytes, kGuardByte);
  __asan_poison_memory_region(memory, memory_bytes);
  used = 0;
  shared_limit = shared_bytes;
  buffers.clear();
}

void end_shared_memory() {
  __asan_unpoison_memory_region(memory, memory_bytes);
  for (const auto& [offset, buffer] : buffers) {
    check_guard(buffer, offset, buffer.memory - kGuard);
    check_guard(buffer, offset, buffer.memory + buffer.bytes);
  }
  munmap(memory, memory_bytes);
  memory = nullptr;
  memory_bytes = 0;
}

void* shared_buffer(int byte_offset, int64_t bytes, const Location& where) {
  const Unseen unseen;
  const auto next = buffers.lower_bound(byte_offset);
  if (next != buffers.end() && next->first == byte_offset) {
    if (next->second.bytes != bytes)
      fail("the shared buffer at offset ", byte_offset, " has ", bytes, " bytes at ", text_of(where), " but ",
           next->second.bytes, " at ", text_of(next->second.where));
    return next->second.memory;
  }
  if (byte_offset < 0 || bytes < 0 || byte_offset + bytes > shared_limit)
    fail("the shared buffer at offset ", byte_offset, " of ", bytes, " bytes, declared at ", text_of(where),
         ", ends after the ", shared_limit, " bytes that the kernel was launched with");
  const auto fail_overlap = [&](int offset, const Buffer& other) {
    fail("shared buffers overlap: offset ", byte_offset, " of ", bytes, " bytes, declared at ", text_of(where),
         ", and offset ", offset, " of ", other.bytes, " bytes, declared at ", text_of(other.where));
  };
  if (next != buffers.end() && next->first < byte_offset + bytes) fail_overlap(next->first, next->second);
  if (next != buffers.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second.bytes > byte_offset) fail_overlap(previous->first, previous->second);
  }
  if (static_cast<int64_t>(buffers.size()) == kMostBuffers) fail("more than ", kMostBuffers, " shared buffers");
  // A place with the alignment that the offset has and no more.
  int64_t place = (used + kGuard + kAlignment - 1) / kAlignment * kAlignment + byte_offset % kAlignment;
  used = place + bytes + kGuard;
  if (used > memory_bytes) fail("the shared buffers and their guards do not fit");
  const Buffer buffer{memory + place, bytes, where};
  __asan_unpoison_memory_region(buffer.memory, bytes);
  fill(buffer.memory, bytes, kPoison);
  buffers.emplace(byte_offset, buffer);
  return buffer.memory;
}

bool is_shared(const void* address) {
  const char* byte = static_cast<const char*>(address);
  return byte >= memory && byte < memory + memory_bytes;
}

}  // namespace emulator
