// Memory that an emulated kernel can reach. The same names for a GPU are in ../device_kernels/on_device.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "report.h"

namespace emulator {

// An array lies remainder bytes after a multiple of 256; the allocation ends with its last byte. It starts as NaN.
inline void* allocate(int64_t bytes, int64_t remainder = 0) {
  constexpr unsigned char kUnwritten = 0xff;
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes + remainder)) fail("no memory for ", bytes, " bytes");
  std::memset(memory, kUnwritten, bytes + remainder);
  return static_cast<char*>(memory) + remainder;
}

inline void release(void* memory) { std::free(memory); }  // of an array without a remainder

inline void write_array(void* to, const char* from, int64_t bytes) { std::memcpy(to, from, bytes); }
inline void read_array(char* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }

}  // namespace emulator
