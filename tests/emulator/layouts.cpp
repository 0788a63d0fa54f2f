// What the chunk kernels' layouts say of every instance: name, tokens per iteration, threads, bytes of shared memory.
#include <cstdio>

#include "cuda/wkv_backward.cuh"
#include "cuda/wkv_forward.cuh"
#include "cuda/wkv_summary.cuh"

namespace rwkv {
namespace {

template <class Layout>
void print(const char* kernel, const char* arguments) {
  std::printf("%s<%s> %d %d %d\n", kernel, arguments, Layout::kTokens, Layout::kThreads, Layout::kSharedBytes);
}

template <class T, class W, int kSize, bool kConstantDecay>
void print_all(const char* arguments) {
  print<ForwardLayout<T, W, kSize, kConstantDecay>>("wkv_forward_kernel", arguments);
  print<BackwardLayout<T, W, kSize, kConstantDecay>>("wkv_backward_kernel", arguments);
  print<SummaryLayout<T, W, kSize, kConstantDecay>>("wkv_summary_kernel", arguments);
}

#define PRINT(...) print_all<__VA_ARGS__>(#__VA_ARGS__)
#define PRINT_SIZES(T, W, kConstantDecay) \
  PRINT(T, W, 32, kConstantDecay);        \
  PRINT(T, W, 64, kConstantDecay);        \
  PRINT(T, W, 128, kConstantDecay)

}  // namespace
}  // namespace rwkv

int main() {
  using namespace rwkv;
  PRINT_SIZES(BFloat16, BFloat16, false);
  PRINT_SIZES(BFloat16, float, false);
  PRINT_SIZES(BFloat16, float, true);
  PRINT_SIZES(Float16, Float16, false);
  PRINT_SIZES(Float16, float, false);
  PRINT_SIZES(Float16, float, true);
}
