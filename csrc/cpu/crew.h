// A crew of threads works through one list of stages. A stage is a number of independent items; every member takes the
// next item that nobody has, and leaves the stage when all its items are done. Nothing depends on how many members
// there are or when they come: one alone finishes everything. Far cheaper than a parallel region for every stage.
// An exception in an item ends the work: it leaves work() in that member, and in every other that waits for the item.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

namespace rwkv {

// Shared by the members.
class Crew {
 public:
  explicit Crew(int64_t stages) : stages_(new Stage[size_t(stages)]) {}

 private:
  friend class CrewMember;
  void fail(std::exception_ptr error);

  struct alignas(64) Stage {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  std::unique_ptr<Stage[]> stages_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // the first; unchanged once failed_ is true
  std::mutex mutex_;
};

// One thread's place in the list. All members must go through the same stages.
class CrewMember {
 public:
  explicit CrewMember(Crew& crew) : crew_(crew), stage_(crew.stages_.get()) {}

  // Calls body(item) for the items that this member gets of 0 to items - 1; returns when all of them are done. Throws
  // what a body has thrown, here or in another member.
  template <class Body>
  void work(int64_t items, const Body& body) {
    int64_t done = 0;
    try {
      for (int64_t item; (item = take()) < items; ++done) body(item);
    } catch (...) {
      fail();
      throw;
    }
    leave(done, items);
  }

 private:
  // Not inline: code that every instruction set's translation unit shares must be compiled for the plainest.
  int64_t take();
  void leave(int64_t done, int64_t items);
  void fail();

  Crew& crew_;
  Crew::Stage* stage_;
};

}  // namespace rwkv
