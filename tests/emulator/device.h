// What a test can set and ask about the emulated device: how many blocks it holds, and the bytes that each launch asked
// of global memory through the primitives: all of them, and without repetitions, as a perfect cache would fetch them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Device {
  int multiprocessors = 4;
  int blocks_each = 2;  // that one multiprocessor holds at once, whatever the kernel
  int most_shared_bytes = 227 * 1024;  // of a block: sm_90's; 163 KiB on sm_80, 99 KiB on sm_86 and sm_89
};

struct Launch {
  std::string kernel;
  int64_t blocks = 0;
  int threads = 0;
  int shared_bytes = 0;
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  int64_t distinct_bytes_read = 0;  // in whole sectors of 32 bytes
};

Device& device();
std::vector<Launch>& launches();  // all so far

// Starts the record of a launch; function is the kernel's address, for its name.
void begin_launch(const void* function, int64_t blocks, int threads, int shared_bytes);

void count_read(const void* address, int64_t bytes);
void count_written(int64_t bytes);

}  // namespace emulator
