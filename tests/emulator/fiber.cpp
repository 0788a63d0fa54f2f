#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "report.h"

#if defined(EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif
#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 256 * 1024;  // unoptimised, instrumented kernels keep their "registers" here

#if defined(EMULATOR_TSAN)
std::vector<void*> tsan_fibers;  // by identity; making one is slow, so they are kept
#endif
#if defined(EMULATOR_ASAN)
Fiber* left = nullptr;  // the fiber that the running one was switched from
#endif

}  // namespace

#if defined(__x86_64__)
// Saves the registers that a function must preserve on the old stack, changes stacks, restores them from the new one.
asm(R"(
.text
.type emulator_switch_stacks,@function
.globl emulator_switch_stacks
emulator_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stacks,.-emulator_switch_stacks
)");
extern "C" void emulator_switch_stacks(void** old_stack_pointer, void* new_stack_pointer);
#endif

void adopt_running([[maybe_unused]] Fiber& fiber) {
#if defined(EMULATOR_TSAN)
  fiber.tsan_fiber = __tsan_get_current_fiber();
#endif
}

void prepare(Fiber& fiber, void (*entry)(), [[maybe_unused]] int identity) {
  fiber.entry = entry;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - 64);
  *--top = nullptr;  // where a return address would be: keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
#if defined(EMULATOR_TSAN)
  while (static_cast<int>(tsan_fibers.size()) <= identity) tsan_fibers.push_back(__tsan_create_fiber(0));
  fiber.tsan_fiber = tsan_fibers[identity];
#endif
#if defined(EMULATOR_ASAN)
  fiber.asan_fake_stack = nullptr;
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
#endif
}

void fiber_begins() {
#if defined(EMULATOR_ASAN)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!left->stack) {  // the process's own stack is learned when it is left first
    left->stack = static_cast<char*>(const_cast<void*>(bottom));
    left->stack_bytes = bytes;
  }
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(EMULATOR_TSAN)
  constexpr unsigned kNoOrder = 1;
  __tsan_switch_to_fiber(to.tsan_fiber, kNoOrder);
#endif
#if defined(EMULATOR_ASAN)
  left = &from;
  __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__)
  emulator_switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

size_t Stacks::bytes() { return kStackBytes; }

char* Stacks::stack(int index) const { return memory_ + index * (kPage + kStackBytes) + kPage; }

void Stacks::release() {
  if (memory_) munmap(memory_, count_ * (kPage + kStackBytes));
  memory_ = nullptr;
  count_ = 0;
}

void Stacks::reserve(int count) {
#if !defined(EMULATOR_TSAN)
  if (count <= count_) return;
#endif
  release();
  void* memory = mmap(nullptr, count * (kPage + kStackBytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stacks of ", count, " threads");
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (int i = 0; i < count; ++i) mprotect(stack(i) - kPage, kPage, PROT_NONE);
}

}  // namespace emulator
