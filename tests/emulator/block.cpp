#include "block.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <vector>

#include "async_copies.h"
#include "fiber.h"
#include "shared_memory.h"
#include "unseen.h"

#if defined(EMULATOR_TSAN)
extern "C" {
void __tsan_acquire(void* object);
void __tsan_release(void* object);
}
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

namespace emulator {
namespace {

struct Thread {
  Fiber fiber;
  int index = 0;
  bool done = false;
  const char* waits_for = nullptr;  // nullptr: does not wait
  Location waits_at;
};

// Where the threads of a block, or the lanes of a warp, wait for all of them.
struct Meeting {
  int expected = 0;
  int64_t number = 0;  // of meetings completed
  const char* operation = nullptr;
  Location where;
  std::vector<Thread*> arrived;
  // Two places that ThreadSanitizer orders by, in turns: a thread that has left this meeting and come to the next must
  // not be taken as ordered before one that is still leaving this one.
  char* order = nullptr;
};

struct Warp {
  Meeting meeting;
  void* operands[32];
};

struct Running {
  const Grid* grid = nullptr;
  int64_t block = 0;
  Thread* thread = nullptr;
  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  std::vector<Warp> warps;
  Meeting block_meeting;
  int done = 0;
  Fiber main;
  Stacks stacks;
  char block_begin, grid_end;  // what ThreadSanitizer orders them by
};

Running running;
ThreadOrder thread_order = ThreadOrder::kAscending;
uint64_t random_state = 1;

uint32_t random_below(size_t limit) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>((random_state >> 33) % limit);
}

// The last one taken first: a warp runs on as far as it can before another one gets its turn.
Thread* take_ready() {
  auto& ready = running.ready;
  if (ready.empty()) return nullptr;
  if (thread_order == ThreadOrder::kRandom) std::swap(ready[random_below(ready.size())], ready.back());
  Thread* next = ready.back();
  ready.pop_back();
  return next;
}

void make_ready(std::vector<Thread*>& threads) {
  std::sort(threads.begin(), threads.end(), [](const Thread* a, const Thread* b) {
    return thread_order == ThreadOrder::kDescending ? a->index < b->index : a->index > b->index;
  });
  running.ready.insert(running.ready.end(), threads.begin(), threads.end());
}

std::string ranges_of(const std::vector<int>& indices) {
  std::ostringstream text;
  for (size_t i = 0; i < indices.size();) {
    size_t end = i + 1;
    while (end < indices.size() && indices[end] == indices[end - 1] + 1) ++end;
    text << (i ? ", " : "") << indices[i];
    if (end - i > 1) text << "-" << indices[end - 1];
    i = end;
  }
  return text.str();
}

[[noreturn]] void fail_stuck() {
  std::map<std::string, std::vector<int>> groups;
  for (const Thread& thread : running.threads)
    groups[thread.done ? "have ended"
                       : std::string("wait in ") + thread.waits_for + " at " + text_of(thread.waits_at)]
        .push_back(thread.index);
  std::ostringstream message;
  for (const auto& [what, indices] : groups) message << "\n  threads " << ranges_of(indices) << " " << what;
  running.thread = nullptr;
  fail("deadlock in block ", running.block, ": nobody can go on", message.str());
}

void run_next_after(Fiber& left) {
  Thread* next = take_ready();
  if (!next && running.done == running.grid->threads) {
    running.thread = nullptr;
    switch_fiber(left, running.main);
    return;
  }
  if (!next) fail_stuck();
  running.thread = next;
  if (&next->fiber != &left) switch_fiber(left, next->fiber);
}

// Returns true in the thread that came last, before the others go on.
bool arrive(Meeting& meeting, const char* operation, const Location& where) {
  Thread& self = *running.thread;
  if (meeting.arrived.empty()) {
    meeting.operation = operation;
    meeting.where = where;
  } else if (meeting.operation != operation || meeting.where.line() != where.line() ||
             meeting.where.column() != where.column()) {
    fail("divergence: comes to ", operation, " at ", text_of(where), " while thread ", meeting.arrived[0]->index,
         " waits for it in ", meeting.operation, " at ", text_of(meeting.where));
  }
  self.waits_for = operation;
  self.waits_at = where;
  meeting.arrived.push_back(&self);
  return static_cast<int>(meeting.arrived.size()) == meeting.expected;
}

void leave_together(Meeting& meeting, Thread& last) {
  meeting.arrived.pop_back();  // the last one
  make_ready(meeting.arrived);
  meeting.arrived.clear();
  ++meeting.number;
  if (thread_order == ThreadOrder::kRandom) {
    running.ready.push_back(&last);
    run_next_after(last.fiber);
  }
  last.waits_for = nullptr;
}

void wait_here(Thread& self) {
  run_next_after(self.fiber);
  self.waits_for = nullptr;
}

void meet_in_order(Meeting& meeting, const char* operation, const Location& where) {
  const Unseen unseen;
  Thread& self = *running.thread;
  char* order = meeting.order + 8 * (meeting.number % 2);
  __tsan_release(order);
  if (arrive(meeting, operation, where))
    leave_together(meeting, self);
  else
    wait_here(self);
  __tsan_acquire(order);
}

void reset(Meeting& meeting, int expected, char* order) {
  meeting.expected = expected;
  meeting.arrived.clear();
  meeting.order = order;
}

// The places that the meetings of a block are ordered by: never used before, because they would order blocks.
class OrderPlaces {
 public:
  OrderPlaces() {
    memory_ = static_cast<char*>(mmap(nullptr, kBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  ~OrderPlaces() { munmap(memory_, kBytes); }
  char* operator[](int meeting) const { return memory_ + 16 * meeting; }

 private:
  static constexpr size_t kBytes = 4096;
  char* memory_;
};

void run_thread() {
  fiber_begins();
  __tsan_acquire(&running.block_begin);
  Thread& self = *running.thread;
  running.grid->run_thread(running.grid->closure);
  check_no_copies_left();
  __tsan_release(&running.grid_end);
  self.done = true;
  ++running.done;
  run_next_after(self.fiber);
  fail("a thread that has ended was continued");
}

// Blocks that run after one another have threads of their own in ThreadSanitizer's eyes, so that it sees what two
// blocks do to the same global memory; the same ones return after so many blocks.
constexpr int kIdentitySets = 3;

void run_block(int64_t block, int ordinal) {
  const Grid& grid = *running.grid;
  running.block = block;
  running.done = 0;
  const OrderPlaces places;
  reset(running.block_meeting, grid.threads, places[0]);
  for (int i = 0; i < grid.threads / 32; ++i) reset(running.warps[i].meeting, 32, places[i + 1]);
  begin_shared_memory(grid.shared_bytes);
  begin_copies(grid.threads);
  running.stacks.reserve(grid.threads);
  std::vector<Thread*> all;
  for (int i = 0; i < grid.threads; ++i) {
    Thread& thread = running.threads[i];
    thread.index = i;
    thread.done = false;
    thread.waits_for = nullptr;
    thread.fiber.stack = running.stacks.stack(i);
    thread.fiber.stack_bytes = Stacks::bytes();
    prepare(thread.fiber, run_thread, ordinal % kIdentitySets * grid.threads + i);
    all.push_back(&thread);
  }
  make_ready(all);
  __tsan_release(&running.block_begin);
  if (grid.threads) run_next_after(running.main);
  end_shared_memory();
}

}  // namespace

void set_thread_order(ThreadOrder order, uint64_t seed) {
  thread_order = order;
  random_state = seed * 2 + 1;
}

void run_grid(const Grid& grid) {
  if (running.grid) fail("a kernel launches a kernel");
  if (grid.threads % 32 || grid.threads < 32 || grid.threads > 1024)
    fail("a block needs 32 to 1024 threads in whole warps, got ", grid.threads);
  running.grid = &grid;
  running.threads.clear();  // contexts may hold pointers into themselves, so they are never moved
  running.threads = std::vector<Thread>(grid.threads);
  running.warps = std::vector<Warp>(grid.threads / 32);
  adopt_running(running.main);
  std::vector<int64_t> blocks(grid.blocks);
  std::iota(blocks.begin(), blocks.end(), int64_t(0));
  if (thread_order == ThreadOrder::kDescending) std::reverse(blocks.begin(), blocks.end());
  if (thread_order == ThreadOrder::kRandom)
    for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[random_below(i)]);
  int ordinal = 0;
  for (const int64_t block : blocks) run_block(block, ordinal++);
  __tsan_acquire(&running.grid_end);
  running.grid = nullptr;
}

int running_thread() { return running.thread->index; }
int64_t running_block() { return running.block; }

void meet_block(const Location& where) { meet_in_order(running.block_meeting, "block_barrier", where); }

void meet_warp(const Location& where) {
  meet_in_order(running.warps[running_thread() / 32].meeting, "warp_barrier", where);
}

void warp_exchange(const char* name, void* operand, WarpOperation compute, const Location& where) {
  const Unseen unseen;
  Thread& self = *running.thread;
  Warp& warp = running.warps[self.index / 32];
  warp.operands[self.index % 32] = operand;
  if (arrive(warp.meeting, name, where)) {
    compute(warp.operands);
    leave_together(warp.meeting, self);
  } else {
    wait_here(self);
  }
}

std::string who_runs() {
  if (!running.grid || !running.thread) return "";
  return "block " + std::to_string(running.block) + ", thread " + std::to_string(running.thread->index) + ": ";
}

}  // namespace emulator
