// One fiber per CUDA thread: a stack and a place to continue. Sanitizers are told of every switch.
#pragma once

#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// The runtime itself is compiled without ThreadSanitizer (only kernels may show accesses), so a build says which
// sanitizer the kernels have: EMULATOR_TSAN or EMULATOR_ASAN.
namespace emulator {

struct Fiber {
  char* stack = nullptr;  // lowest address; nullptr: the stack the process started on
  size_t stack_bytes = 0;
  void (*entry)() = nullptr;
  void* stack_pointer = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  void* tsan_fiber = nullptr;
  void* asan_fake_stack = nullptr;
};

// The fiber of the code that calls this, outside all others.
void adopt_running(Fiber& fiber);

// entry runs when the fiber is first switched to, must not return, and starts with fiber_begins(). To ThreadSanitizer
// fibers with the same identity are one thread, at one time and another.
void prepare(Fiber& fiber, void (*entry)(), int identity);
void fiber_begins();

// Continues `to`; returns when somebody continues `from`. ThreadSanitizer sees no order between the two.
void switch_fiber(Fiber& from, Fiber& to);

// Memory for the stacks of count fibers, with an unreadable page below each.
class Stacks {
 public:
  ~Stacks() { release(); }
  void reserve(int count);  // under ThreadSanitizer fresh memory at each call, so that it forgets who used it before
  void release();
  char* stack(int index) const;
  static size_t bytes();

 private:
  char* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace emulator
