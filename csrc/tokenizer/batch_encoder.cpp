#include "tokenizer/batch_encoder.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

namespace rwkv {
namespace {

constexpr size_t kTaskBytes = 256 * 1024;

// Calls work(thread, task) for every task, each once, on up to `threads` threads; throws what work() threw first.
template <typename Work>
void share_tasks(size_t tasks, size_t threads, const Work& work) {
  std::atomic<size_t> next{0};
  std::vector<std::exception_ptr> errors(threads);
  const auto run = [&](size_t thread) {
    try {
      for (size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(thread, task);
    } catch (...) {
      errors[thread] = std::current_exception();
      next.store(tasks, std::memory_order_relaxed);
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

}  // namespace

void BatchEncoder::cut(const Encoder& encoder, std::string_view text) {
  do {
    const size_t end = encoder.find_boundary(text, kTaskBytes);
    pieces_.push_back({text.substr(0, end), 0, 0, 0, 0});
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
  threads_ = std::clamp<size_t>(tasks_.size() - 1, 1, std::max<size_t>(threads, 1));
  ids_.resize(threads_);

  share_tasks(tasks_.size() - 1, threads_, [&](size_t thread, size_t task) {
    const Encoder::Memo memo(encoder);
    ids_[thread].reserve(expected_ids(all_bytes / threads_));
    for (size_t i = tasks_[task]; i < tasks_[task + 1]; ++i) {
      Piece& piece = pieces_[i];
      piece.thread = thread;
      piece.begin = ids_[thread].size();
      encoder.encode(piece.text, ids_[thread], memo);
      piece.count = ids_[thread].size() - piece.begin;
    }
  });

  size_t end = 0;
  for (Piece& piece : pieces_) {
    piece.offset = end;
    end += piece.count;
  }
  offsets_.reserve(texts.size() + 1);
  for (const size_t piece : first_piece) offsets_.push_back(static_cast<int64_t>(pieces_[piece].offset));
  offsets_.push_back(static_cast<int64_t>(end));
}

template <typename Id>
void BatchEncoder::copy(Id* ids) const {
  share_tasks(tasks_.size() - 1, threads_, [&](size_t, size_t task) {
    for (size_t i = tasks_[task]; i < tasks_[task + 1]; ++i) {
      const Piece& piece = pieces_[i];
      const uint16_t* begin = ids_[piece.thread].data() + piece.begin;
      std::copy(begin, begin + piece.count, ids + piece.offset);
    }
  });
}

template void BatchEncoder::copy(uint16_t* ids) const;
template void BatchEncoder::copy(uint32_t* ids) const;

}  // namespace rwkv
