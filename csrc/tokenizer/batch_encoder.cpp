#include "tokenizer/batch_encoder.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "tokenizer/streaming_copy.h"

namespace rwkv {
namespace {

constexpr size_t kTaskBytes = 128 * 1024;  // of text: their ids stay in a core's cache until they are copied
constexpr size_t kCopyIds = 64 * 1024;

// Numbers from 0 on, each for one thread.
class TaskQueue {
 public:
  explicit TaskQueue(size_t tasks) : tasks_(tasks) {}
  bool take(size_t& task) { return (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_; }
  void stop() { next_.store(tasks_, std::memory_order_relaxed); }

 private:
  const size_t tasks_;
  std::atomic<size_t> next_{0};
};

// Calls work(thread, queue) on up to `threads` threads, which share the tasks; throws what it threw first.
template <typename Work>
void share_tasks(size_t tasks, size_t threads, const Work& work) {
  TaskQueue queue(tasks);
  std::vector<std::exception_ptr> errors(threads);
  const auto run = [&](size_t thread) {
    try {
      work(thread, queue);
    } catch (...) {
      errors[thread] = std::current_exception();
      queue.stop();
    }
  };
  std::vector<std::thread> others;
  try {
    others.reserve(threads);
    for (size_t thread = 1; thread < std::min(threads, tasks); ++thread) others.emplace_back(run, thread);
  } catch (const std::exception&) {  // no more threads to be had: those that run do the work
  }
  run(0);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// Where the ids of each task begin among all: known once all tasks before it are counted.
class TaskOffsets {
 public:
  explicit TaskOffsets(size_t tasks) : counts_(tasks, kUnknown), offsets_(tasks + 1) {}

  // Takes the number of a task's ids. Returns the last task whose offset is known now.
  size_t count(size_t task, size_t ids) {
    const std::lock_guard lock(mutex_);
    counts_[task] = ids;
    for (; last_ < counts_.size() && counts_[last_] != kUnknown; ++last_) {
      offsets_[last_ + 1] = offsets_[last_] + counts_[last_];
    }
    return last_;
  }
  // Of a task that count() said is known; the number of all ids for the one behind the last.
  size_t operator[](size_t task) const { return offsets_[task]; }

 private:
  static constexpr size_t kUnknown = ~size_t{0};

  std::mutex mutex_;
  std::vector<size_t> counts_;
  std::vector<size_t> offsets_;
  size_t last_ = 0;
};

}  // namespace

// One thread's part. What it encoded waits in its cache until it is known where it belongs.
class BatchEncoder::Worker {
 public:
  // expected: how many ids to reserve room for, of one task.
  Worker(BatchEncoder& batch, const Encoder& encoder, TaskOffsets& offsets, size_t expected)
      : batch_(batch), encoder_(encoder), offsets_(offsets), expected_(expected), memo_(encoder) {}

  void encode(size_t task) {
    waiting_.push_back({task, take_buffer()});
    IdBuffer& ids = waiting_.back().ids;
    ids.reserve(expected_);
    for (size_t i = batch_.tasks_[task]; i < batch_.tasks_[task + 1]; ++i) {
      Piece& piece = batch_.pieces_[i];
      const size_t before = ids.size();
      encoder_.encode(piece.text, ids, memo_);
      piece.count = ids.size() - before;
    }
    place(offsets_.count(task, ids.size()));
  }

  // Copies the ids of tasks up to `last` to their place, where there is room.
  void place(size_t last) {
    while (!waiting_.empty() && waiting_.front().task <= last) {
      IdBuffer& ids = waiting_.front().ids;
      const size_t offset = offsets_[waiting_.front().task];
      if (offset + ids.size() > batch_.ids_.capacity()) return;
      streaming_copy(ids.data(), ids.size(), batch_.ids_.data() + offset);
      spare_.push_back(std::move(ids));
      waiting_.pop_front();
    }
  }

 private:
  struct Encoded {
    size_t task;
    IdBuffer ids;
  };

  // One that is still in the cache, if there is one.
  IdBuffer take_buffer() {
    if (spare_.empty()) return {};
    IdBuffer ids = std::move(spare_.back());
    spare_.pop_back();
    ids.clear();
    return ids;
  }

  BatchEncoder& batch_;
  const Encoder& encoder_;
  TaskOffsets& offsets_;
  const size_t expected_;
  const Encoder::Memo memo_;
  std::deque<Encoded> waiting_;
  std::vector<IdBuffer> spare_;
};

void BatchEncoder::cut(const Encoder& encoder, std::string_view text) {
  do {
    const size_t end = encoder.find_boundary(text, kTaskBytes);
    pieces_.push_back({text.substr(0, end), 0});
    text.remove_prefix(end);
  } while (!text.empty());
}

BatchEncoder::BatchEncoder(const Encoder& encoder, const std::vector<std::string_view>& texts, size_t threads)
    : tasks_(1, 0) {
  std::vector<size_t> first_piece;
  size_t all_bytes = 0;
  size_t bytes = 0;  // of the task that is not full yet
  for (const std::string_view text : texts) {
    first_piece.push_back(pieces_.size());
    cut(encoder, text);
    all_bytes += text.size();
    for (size_t piece = first_piece.back(); piece < pieces_.size(); ++piece) {
      bytes += pieces_[piece].text.size();
      if (bytes < kTaskBytes) continue;
      tasks_.push_back(piece + 1);
      bytes = 0;
    }
  }
  if (tasks_.back() < pieces_.size()) tasks_.push_back(pieces_.size());
  const size_t tasks = tasks_.size() - 1;
  threads_ = std::clamp<size_t>(tasks, 1, std::max<size_t>(threads, 1));

  ids_.reserve(encoder.expected_ids(texts));
  TaskOffsets offsets(tasks);
  std::vector<std::optional<Worker>> workers(threads_);
  share_tasks(tasks, threads_, [&](size_t thread, TaskQueue& queue) {
    Worker& worker = workers[thread].emplace(*this, encoder, offsets, expected_ids(std::min(all_bytes, kTaskBytes)));
    for (size_t task; queue.take(task);) worker.encode(task);
  });
  ids_.set_end(ids_.room(offsets[tasks]) + offsets[tasks]);
  for (std::optional<Worker>& worker : workers) {
    if (worker) worker->place(tasks);
  }

  int64_t end = 0;
  size_t piece = 0;
  offsets_.reserve(texts.size() + 1);
  for (const size_t first : first_piece) {
    for (; piece < first; ++piece) end += static_cast<int64_t>(pieces_[piece].count);
    offsets_.push_back(end);
  }
  offsets_.push_back(static_cast<int64_t>(offsets[tasks]));
}

void BatchEncoder::copy(uint32_t* ids) const {
  share_tasks((ids_.size() + kCopyIds - 1) / kCopyIds, threads_, [&](size_t, TaskQueue& queue) {
    for (size_t task; queue.take(task);) {
      const size_t begin = task * kCopyIds;
      std::copy(ids_.data() + begin, ids_.data() + std::min(begin + kCopyIds, ids_.size()), ids + begin);
    }
  });
}

}  // namespace rwkv
