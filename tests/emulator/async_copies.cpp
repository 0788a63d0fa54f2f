#include "async_copies.h"

#include <cstdint>
#include <deque>
#include <vector>

#include "block.h"
#include "unseen.h"

namespace emulator {
namespace {

struct Pending {
  Copy copy;
  int64_t group;
};

struct Queue {
  std::deque<Pending> copies;
  int64_t groups = 0;  // committed
};

std::vector<Queue> queues;  // by thread

}  // namespace

void begin_copies(int threads) { queues.assign(threads, Queue{}); }

void issue_copy(const Copy& copy) {
  const Unseen unseen;
  Queue& queue = queues[running_thread()];
  queue.copies.push_back({copy, queue.groups});
}

void commit_group() { ++queues[running_thread()].groups; }

bool next_arrived(int pending_groups, Copy& copy) {
  const Unseen unseen;
  Queue& queue = queues[running_thread()];
  if (queue.copies.empty() || queue.copies.front().group >= queue.groups - pending_groups) return false;
  copy = queue.copies.front().copy;
  queue.copies.pop_front();
  return true;
}

void check_no_copies_left() {
  const Queue& queue = queues[running_thread()];
  if (queue.copies.empty()) return;
  const Pending& pending = queue.copies.front();
  fail("the thread ends with ", queue.copies.size(), " asynchronous copies that it never waited for; the first, ",
       pending.group < queue.groups ? "committed" : "never committed", ", is from ", text_of(pending.copy.where));
}

}  // namespace emulator
