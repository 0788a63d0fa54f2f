// One token of the WKV recurrence for decoding, state updated in place (equations: cpu/wkv_recurrence.h).
// One block per (batch row, head). The state, N * N * 4 bytes read and written once, is all the traffic that counts:
// each thread keeps four value columns of N / kRowGroups key rows, so a warp touches whole 128-byte lines.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "wkv_params.h"

namespace rwkv {

template <class T>
__device__ T load_element(const View& view, int64_t offset) {
  switch (view.dtype) {
    case Dtype::kFloat64: return T(static_cast<const double*>(view.data)[offset]);
    case Dtype::kBFloat16: return T(__bfloat162float(static_cast<const __nv_bfloat16*>(view.data)[offset]));
    case Dtype::kFloat16: return T(__half2float(static_cast<const __half*>(view.data)[offset]));
    default: return T(static_cast<const float*>(view.data)[offset]);
  }
}

template <class T>
__device__ void store_element(const View& view, int64_t offset, T value) {
  switch (view.dtype) {
    case Dtype::kFloat64: static_cast<double*>(view.data)[offset] = double(value); break;
    case Dtype::kBFloat16: static_cast<__nv_bfloat16*>(view.data)[offset] = __float2bfloat16(float(value)); break;
    case Dtype::kFloat16: static_cast<__half*>(view.data)[offset] = __float2half(float(value)); break;
    default: static_cast<float*>(view.data)[offset] = float(value);
  }
}

template <class T>
struct alignas(4 * sizeof(T)) Columns {
  T value[4];
};

constexpr int kStepThreads = 256;

template <class T, int kSize>
__global__ void __launch_bounds__(kStepThreads) wkv_step_kernel(WkvStepParams p) {
  constexpr int kColumnGroups = kSize / 4;
  constexpr int kRowGroups = kStepThreads / kColumnGroups;
  constexpr int kRows = kSize / kRowGroups;
  static_assert(kRowGroups * kColumnGroups == kStepThreads && kRows * kRowGroups == kSize);
  __shared__ T r[kSize], k[kSize], v[kSize], decay[kSize], bonus[kSize], partial[kRowGroups][kSize];

  const int64_t row = blockIdx.x / p.shape.heads, head = blockIdx.x % p.shape.heads;
  const int64_t slot = p.slots ? p.slots[row] : row;
  const auto at = [&](const View& view, int i) { return row * view.batch_stride + head * view.head_stride + i; };
  if (slot < 0 || slot >= p.shape.sequences) {  // a skipped row is 0; a slot that does not exist is NaN
    for (int i = threadIdx.x; i < kSize; i += kStepThreads)
      store_element<T>(p.y, at(p.y, i), slot == -1 ? T(0) : T(NAN));
    return;
  }
  for (int i = threadIdx.x; i < kSize; i += kStepThreads) {
    r[i] = load_element<T>(p.r, at(p.r, i));
    k[i] = load_element<T>(p.k, at(p.k, i));
    v[i] = load_element<T>(p.v, at(p.v, i));
    decay[i] = exp(-exp(load_element<T>(p.w, at(p.w, i))));
    bonus[i] = r[i] * load_element<T>(p.u, head * p.u.head_stride + i) * k[i];
  }
  __syncthreads();  // the rows are in shared memory

  const int column = threadIdx.x % kColumnGroups * 4, group = threadIdx.x / kColumnGroups;
  T* state = static_cast<T*>(p.state) + (slot * p.shape.heads + head) * (kSize * kSize);
  T out[4] = {};
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    const int i = group + n * kRowGroups;
    auto* place = reinterpret_cast<Columns<T>*>(state + i * kSize + column);
    Columns<T> s = *place;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      out[c] += r[i] * s.value[c];
      s.value[c] = decay[i] * s.value[c] + k[i] * v[column + c];
    }
    *place = s;
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) partial[group][column + c] = out[c];
  __syncthreads();  // every row group's share of y is in shared memory

  for (int j = threadIdx.x; j < kSize; j += kStepThreads) {
    T total = 0, current = 0;
    for (int g = 0; g < kRowGroups; ++g) total += partial[g][j];
    for (int i = 0; i < kSize; ++i) current += bonus[i];
    store_element<T>(p.y, at(p.y, j), total + current * v[j]);
  }
}

template <class T, int kSize>
void run_wkv_step(const WkvStepParams& p, cudaStream_t stream) {
  wkv_step_kernel<T, kSize><<<static_cast<unsigned>(p.shape.batch * p.shape.heads), kStepThreads, 0, stream>>>(p);
}

}  // namespace rwkv
