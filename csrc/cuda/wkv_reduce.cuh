// The backward's second stage: du[h, i] = sum over segments of their share, and likewise Eagle's dw. In double (one
// block per head and output), always in the same order.
#pragma once

#include "cuda/device_launch.h"
#include "cuda/element.cuh"
#include "cuda/wkv_segments.h"

namespace rwkv {

inline constexpr int kReduceThreads = 256;

template <class Real>
__global__ void __launch_bounds__(kReduceThreads) wkv_reduce_kernel(const __grid_constant__ ReduceTask task) {
  double* const sums = shared_array<double>(0, kReduceThreads);
  const int64_t heads = task.shape.heads, head = block_index() % heads;
  const bool is_dw = block_index() >= heads;
  const Real* const partial = static_cast<const Real*>(is_dw ? task.dw_partial : task.du_partial);
  const int size = static_cast<int>(task.shape.head_size), channel = thread_index() % size;
  const int group = thread_index() / size, groups = kReduceThreads / size;  // of items

  double sum = 0;
  for (int64_t item = group; item < task.work.items; item += groups) {
    const Segment segment = segment_of(task.shape, task.work, item);
    if (segment.item.sequence >= 0) sum += load_global<Real>(partial + (segment.slot * heads + head) * size + channel);
  }
  sums[thread_index()] = sum;
  block_barrier();  // every group's sum is there
  if (group > 0) return;
  for (int other = 1; other < groups; ++other) sum += sums[other * size + channel];
  const View& total = is_dw ? task.dw : task.du;
  store_element(total, head * total.head_stride + channel, static_cast<Real>(sum));
}

template <class Real>
int run_wkv_reduce(const ReduceTask& task, void* stream) {
  return launch(wkv_reduce_kernel<Real>, task.shape.heads * (task.shape.constant_decay ? 2 : 1), kReduceThreads,
                kReduceThreads * int{sizeof(double)}, task, stream);
}

}  // namespace rwkv
