// A crew whose item throws: every member ends with that exception, whoever had the item, and nobody goes on to the next
// stage. Prints what went wrong; exit status 1.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/crew.h"

constexpr int kRounds = 30, kItems = 64, kBadItem = 37;

// Returns how many of `members` ended with the item's exception.
int caught_by(int members, bool throws, std::atomic<int>& before, std::atomic<int>& after) {
  rwkv::Crew crew(3);
  std::atomic<int> caught{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < members; ++i)
    threads.emplace_back([&] {
      rwkv::CrewMember member(crew);
      try {
        member.work(kItems, [&](int64_t) { ++before; });
        member.work(kItems, [&](int64_t item) {
          if (throws && item == kBadItem) throw std::runtime_error("item 37");
        });
        member.work(kItems, [&](int64_t) { ++after; });
      } catch (const std::runtime_error& error) {
        caught += error.what() == std::string("item 37");
      }
    });
  for (std::thread& thread : threads) thread.join();
  return caught;
}

int main() {
  for (int round = 0; round < kRounds; ++round)
    for (const int members : {1, 2, 5})
      for (const bool throws : {false, true}) {
        std::atomic<int> before{0}, after{0};
        const int caught = caught_by(members, throws, before, after);
        if (before == kItems && after == (throws ? 0 : kItems) && caught == (throws ? members : 0)) continue;
        std::printf("%d members: %d caught, %d items before, %d after\n", members, caught, before.load(), after.load());
        return 1;
      }
}
