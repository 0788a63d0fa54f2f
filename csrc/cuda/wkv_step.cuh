// One token of the WKV recurrence for decoding, state updated in place (e = exp(-exp(w)), per batch row and head):
//   y[j]   = sum_i r[i] (S[i,j] + u[i] k[i] v[j])
//   S[i,j] = e[i] S[i,j] + k[i] v[j]
// One block per (batch row, head). The state, N * N elements read and written once, is all the traffic that counts:
// a thread keeps four value columns of N / kRowGroups key rows, so that a warp touches whole 128-byte lines, and asks
// for them before anything else.
#pragma once

#include "cuda/device_launch.h"
#include "cuda/element.cuh"

namespace rwkv {

inline constexpr int kStepThreads = 256;

template <class Real, int kSize>
struct StepLayout {
  static constexpr int kColumnGroups = kSize / 4;
  static constexpr int kRowGroups = kStepThreads / kColumnGroups;
  static constexpr int kRows = kSize / kRowGroups;  // of one thread
  static_assert(kRowGroups * kColumnGroups == kStepThreads && kRows * kRowGroups == kSize);
  // Shared memory, in elements: five rows, and every row group's share of y.
  static constexpr int kRow = kSize * int{sizeof(Real)};
  static constexpr int kBytes = (5 + kRowGroups) * kRow;
};

template <class Real, int kSize>
__global__ void __launch_bounds__(kStepThreads) wkv_step_kernel(const __grid_constant__ WkvStepParams p) {
  using Layout = StepLayout<Real, kSize>;
  Real* r = shared_array<Real>(0 * Layout::kRow, kSize);
  Real* k = shared_array<Real>(1 * Layout::kRow, kSize);
  Real* v = shared_array<Real>(2 * Layout::kRow, kSize);
  Real* decay = shared_array<Real>(3 * Layout::kRow, kSize);
  Real* bonus = shared_array<Real>(4 * Layout::kRow, kSize);
  Real* partial = shared_array<Real>(5 * Layout::kRow, Layout::kRowGroups * kSize);

  const int thread = thread_index();
  const int64_t row = block_index() / p.shape.heads, head = block_index() % p.shape.heads;
  const int64_t slot = p.slots ? load_global<int64_t>(p.slots + row) : row;
  if (slot < 0 || slot >= p.shape.sequences) {  // a skipped row is 0; a slot that does not exist is NaN
    if (thread < kSize)
      store_element(p.y, offset_of(p.y, row, 0, head) + thread, slot == -1 ? Real(0) : Real(NAN));
    return;
  }

  const int column = thread % Layout::kColumnGroups * 4, group = thread / Layout::kColumnGroups;
  Real* state = static_cast<Real*>(p.state) + (slot * p.shape.heads + head) * (kSize * kSize) + column;
  Four<Real> s[Layout::kRows];
#pragma unroll
  for (int n = 0; n < Layout::kRows; ++n)
    s[n] = load_four_global(state + (group + n * Layout::kRowGroups) * kSize);

  if (thread < kSize) {
    const auto at = [&](const View& view) { return offset_of(view, row, 0, head) + thread; };
    const auto raw_r = load_raw<Real>(p.r, at(p.r)), raw_k = load_raw<Real>(p.k, at(p.k));
    const auto raw_v = load_raw<Real>(p.v, at(p.v)), raw_w = load_raw<Real>(p.w, at(p.w));
    const auto raw_u = load_raw<Real>(p.u, head * p.u.head_stride + thread);
    r[thread] = element_value(raw_r, p.r.dtype);
    k[thread] = element_value(raw_k, p.k.dtype);
    v[thread] = element_value(raw_v, p.v.dtype);
    decay[thread] = exponential(-exponential(element_value(raw_w, p.w.dtype)));
    bonus[thread] = r[thread] * element_value(raw_u, p.u.dtype) * k[thread];
  }
  block_barrier();  // the rows are in shared memory

  const Four<Real> value = load_four_shared(v + column);
  Four<Real> out = {};
  Real current = 0;
#pragma unroll
  for (int n = 0; n < Layout::kRows; ++n) {
    const int i = group + n * Layout::kRowGroups;
    current += bonus[i];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      out[c] += r[i] * s[n][c];
      s[n][c] = decay[i] * s[n][c] + k[i] * value[c];
    }
    store_four_global(state + i * kSize, s[n]);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) partial[group * kSize + column + c] = out[c] + current * value[c];
  block_barrier();  // every row group's share of y is in shared memory

  if (thread < kSize) {
    Real total = 0;
#pragma unroll
    for (int g = 0; g < Layout::kRowGroups; ++g) total += partial[g * kSize + thread];
    store_element(p.y, offset_of(p.y, row, 0, head) + thread, total);
  }
}

template <class Real, int kSize>
int run_wkv_step(const WkvStepParams& p, void* stream) {
  return launch(wkv_step_kernel<Real, kSize>, p.shape.batch * p.shape.heads, kStepThreads,
                StepLayout<Real, kSize>::kBytes, p, stream);
}

}  // namespace rwkv
