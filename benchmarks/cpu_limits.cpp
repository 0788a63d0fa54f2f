// What this processor can do at most, one line per limit: fused multiply-adds per second of one thread in lanes of the
// width this is compiled for, and bytes per second of updating a large array in place (read and written bytes both
// count). Compiled and run by cpu_limits.py: cpu_limits SECONDS ARRAY_MIB THREADS
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

typedef float Lanes __attribute__((vector_size(LANE_BYTES)));

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Twelve sums, because a multiply-add takes about four cycles and two or three begin in each.
double multiply_adds_per_second(double seconds) {
  constexpr int kSums = 12;
  constexpr long kRounds = 200000;
  Lanes sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Lanes{} + 0.1f * float(i);
  const Lanes factor = Lanes{} + 0.999999f, term = Lanes{} + 1e-7f;
  double best = 1e9;
  for (const double end = now() + seconds; now() < end;) {
    const double start = now();
    for (long round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + term;
      asm volatile("" : : "x"(sums[0]), "x"(sums[1]), "x"(sums[2]), "x"(sums[3]), "x"(sums[4]), "x"(sums[5]),
                   "x"(sums[6]), "x"(sums[7]), "x"(sums[8]), "x"(sums[9]), "x"(sums[10]), "x"(sums[11]));
    }
    best = std::min(best, now() - start);
  }
  return double(kRounds) * kSums * (LANE_BYTES / 4) / best;
}

double bytes_updated_per_second(double seconds, long mebibytes, int threads) {
  const long count = (mebibytes << 20) / long(sizeof(float)) / threads;
  std::vector<std::vector<float>> arrays(threads, std::vector<float>(count, 1.0f));
  const auto update = [&](std::vector<float>& array) {
    const Lanes factor = Lanes{} + 0.999f;
    for (long i = 0; i + LANE_BYTES / 4 <= count; i += LANE_BYTES / 4) {
      Lanes x;
      std::memcpy(&x, &array[i], sizeof x);
      x *= factor;
      std::memcpy(&array[i], &x, sizeof x);
    }
    asm volatile("" : : "r"(array.data()) : "memory");
  };
  double best = 1e9;
  for (const double end = now() + seconds; now() < end;) {
    const double start = now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(update, std::ref(arrays[i]));
    update(arrays[0]);
    for (auto& thread : others) thread.join();
    best = std::min(best, now() - start);
  }
  return 2.0 * sizeof(float) * double(count) * threads / best;
}

}  // namespace

int main(int, char** arguments) {
  const double seconds = std::atof(arguments[1]);
  std::printf("%.6g\n%.6g\n", multiply_adds_per_second(seconds),
              bytes_updated_per_second(seconds, std::atol(arguments[2]), std::atoi(arguments[3])));
}
