// Runs the blocks of a grid one after another, each as fibers that run until they must wait for one another.
// A wait that cannot end is reported at once: with cooperative fibers it is seen when nobody is left to run.
#pragma once

#include <cstdint>
#include <string>

#include "report.h"

namespace emulator {

enum class ThreadOrder { kAscending, kDescending, kRandom };

struct Grid {
  void (*run_thread)(const void* closure) = nullptr;
  const void* closure = nullptr;
  int64_t blocks = 0;
  int threads = 0;  // per block, a multiple of 32
  int shared_bytes = 0;
};

void set_thread_order(ThreadOrder order, uint64_t seed);

// Runs all blocks; a kernel cannot start another.
void run_grid(const Grid& grid);

// ---- called by a kernel's threads ----

int running_thread();
int64_t running_block();

// These order memory between the threads that meet, for ThreadSanitizer too.
void meet_block(const Location& where);
void meet_warp(const Location& where);

// Waits for all 32 lanes, hands their operands to compute (once, lane by lane) and goes on. Orders nothing.
using WarpOperation = void (*)(void* (&operands)[32]);
void warp_exchange(const char* name, void* operand, WarpOperation compute, const Location& where);

std::string who_runs();  // "block 3, thread 5: ", or nothing outside a kernel

}  // namespace emulator
