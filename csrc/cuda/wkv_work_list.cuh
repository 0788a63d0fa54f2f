// Which block works on what when sequences are packed: cu_seqlens, which only the device knows, becomes a list of
// segments, long ones first, so that what starts last is short. One block, no atomics: the list is the same every time.
//
// A counting sort by length: every thread counts the segments of its own run of sequences by length class, a prefix sum
// over (class, thread) turns the counts into places, and every thread writes its segments to theirs.
// cu_seqlens cannot be refused here: its values are taken as 0, then never less than the one before nor more than all
// tokens, and all tokens at the end. So every token belongs to exactly one segment, whatever they are.
#pragma once

#include "cuda/device_launch.h"
#include "cuda/static_for.h"
#include "cuda/wkv_segments.h"

namespace rwkv {

struct WorkListLayout {
  static constexpr int kThreads = 256;
  static constexpr int kClasses = 16;  // of length
  static constexpr int kCounts = kClasses * kThreads;
  static constexpr int kPaddedCounts = kCounts + kCounts / 32;
  // Byte offsets in shared memory; a scan needs two values a thread.
  static constexpr int kBounds = 0;
  static constexpr int kSums = kBounds + 2 * kThreads * int{sizeof(int64_t)};
  static constexpr int kPlaces = kSums + 2 * kThreads * int{sizeof(int32_t)};
  static constexpr int kTotal = kPlaces + kPaddedCounts * int{sizeof(int32_t)};
  static constexpr int kSharedBytes = kTotal + 16;

  // Where a count lies: neighbouring threads' runs of kClasses counts are in different banks.
  __device__ static int padded(int index) { return index + index / 32; }
};

// combine() of the values of all threads before this one; identity for the first. The buffer has two values a thread.
template <class Value, class Combine>
__device__ Value combine_before(Value own, Value identity, Value* buffer, const Combine& combine) {
  constexpr int kThreads = WorkListLayout::kThreads;
  const int self = thread_index();
  Value* current = buffer;
  Value* next = buffer + kThreads;
  current[self] = own;
  for (int reach = 1; reach < kThreads; reach *= 2) {
    block_barrier();  // what this round reads has been written, what it writes has been read
    next[self] = self >= reach ? combine(current[self - reach], current[self]) : current[self];
    Value* const written = next;
    next = current, current = written;
  }
  block_barrier();  // the last round has been written
  return self > 0 ? current[self - 1] : identity;
}

// A run of sequences and their clamped bounds.
template <class Index>
struct SequenceRun {
  const WorkListTask& task;
  int64_t first, last;  // sequences, last not included
  int64_t begin;        // of the first one, in tokens

  __device__ int64_t bound(int64_t sequence) const {  // where it ends, unclamped
    return static_cast<const Index*>(task.shape.cu_seqlens)[sequence + 1];
  }

  // visit(item) for every segment of every sequence of the run.
  template <class Visit>
  __device__ void for_each_item(const Visit& visit) const {
    const int64_t all = task.shape.tokens, segment_tokens = task.segment_tokens;
    int64_t from = begin;
    for (int64_t sequence = first; sequence < last; ++sequence) {
      int64_t to = sequence + 1 == task.shape.sequences ? all : bound(sequence);
      to = to < from ? from : to > all ? all : to;
      const int64_t segments = segments_of_length(to - from, segment_tokens);
      WorkItem item = {static_cast<int32_t>(sequence), 0, static_cast<int32_t>(segments), 0, from, segment_tokens};
      for (; item.segment + 1 < item.segments; ++item.segment, item.first_token += segment_tokens) visit(item);
      item.tokens = to - item.first_token;
      visit(item);
      from = to;
    }
  }
};

// 0 for the longest segments, kClasses - 1 for the shortest. The longest is a sequence of two segments' tokens.
__device__ inline int length_class(int64_t tokens, int64_t segment_tokens) {
  return WorkListLayout::kClasses - 1 -
         static_cast<int>(tokens * WorkListLayout::kClasses / (2 * segment_tokens + 1));
}

template <class Index>
__global__ void __launch_bounds__(WorkListLayout::kThreads)
    wkv_work_list_kernel(const __grid_constant__ WorkListTask task) {
  using Layout = WorkListLayout;
  int64_t* const bounds = shared_array<int64_t>(Layout::kBounds, 2 * Layout::kThreads);
  int32_t* const sums = shared_array<int32_t>(Layout::kSums, 2 * Layout::kThreads);
  int32_t* const places = shared_array<int32_t>(Layout::kPlaces, Layout::kPaddedCounts);
  int32_t* const total = shared_array<int32_t>(Layout::kTotal, 1);
  const int self = thread_index();
  const auto place_of = [&](const WorkItem& item) -> int32_t& {  // this thread's own in the class of the item
    return places[Layout::padded(length_class(item.tokens, task.segment_tokens) * Layout::kThreads + self)];
  };

  const int64_t sequences = task.shape.sequences, each = (sequences + Layout::kThreads - 1) / Layout::kThreads;
  const auto inside = [&](int64_t sequence) { return sequence < sequences ? sequence : sequences; };
  SequenceRun<Index> run = {task, inside(self * each), inside((self + 1) * each), 0};
  const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
  int64_t furthest = 0;
  for (int64_t sequence = run.first; sequence < run.last; ++sequence) furthest = larger(furthest, run.bound(sequence));
  run.begin = combine_before<int64_t>(furthest, 0, bounds, larger);
  if (run.begin > task.shape.tokens) run.begin = task.shape.tokens;

  for (int c = 0; c < Layout::kClasses; ++c) places[Layout::padded(c * Layout::kThreads + self)] = 0;
  run.for_each_item([&](const WorkItem& item) { ++place_of(item); });
  block_barrier();  // all counts are there
  int32_t counts[Layout::kClasses], own = 0;
  static_for<0, Layout::kClasses>([&](auto i) {
    counts[i.value] = places[Layout::padded(self * Layout::kClasses + i.value)];
    own += counts[i.value];
  });
  int32_t place = combine_before<int32_t>(own, 0, sums, [](int32_t a, int32_t b) { return a + b; });
  static_for<0, Layout::kClasses>([&](auto i) {
    places[Layout::padded(self * Layout::kClasses + i.value)] = place;
    place += counts[i.value];
  });
  if (self == Layout::kThreads - 1) *total = place;
  block_barrier();  // all places are there, and how many there are

  run.for_each_item([&](const WorkItem& item) { task.list[place_of(item)++] = item; });
  for (int64_t unused = *total + self; unused < task.items; unused += Layout::kThreads)
    task.list[unused] = {-1, 0, 1, 0, 0, 0};
}

}  // namespace rwkv
