#include "cpu/crew.h"

#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rwkv {
namespace {

constexpr int kSpins = 4000;  // some 50 us: longer than any stage, shorter than a thread's turn on a busy machine

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

void Crew::fail(std::exception_ptr error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!error_) error_ = std::move(error);
  failed_.store(true, std::memory_order_release);
}

int64_t CrewMember::take() { return stage_->next.fetch_add(1, std::memory_order_relaxed); }

void CrewMember::leave(int64_t done, int64_t items) {
  // Release: what this member wrote is there for whoever sees the count; acquire: the others' results.
  if (done) stage_->done.fetch_add(done, std::memory_order_acq_rel);
  for (int spin = 0; stage_->done.load(std::memory_order_acquire) < items; ++spin) {
    // Nobody writes error_ any more: a second failure finds it set.
    if (crew_.failed_.load(std::memory_order_acquire)) std::rethrow_exception(crew_.error_);
    if (spin < kSpins)
      pause();
    else
      std::this_thread::yield();  // the item's owner may be waiting for this processor
  }
  ++stage_;
}

void CrewMember::fail() { crew_.fail(std::current_exception()); }

}  // namespace rwkv
