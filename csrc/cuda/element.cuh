// One element of a tensor whose dtype is known at run time, and four neighbours of an array of the arithmetic type
// Real. Reading is in two steps, so that many elements can be on their way before the first is needed.
#pragma once

#include <cmath>

#include "cuda/device_primitives.h"
#include "wkv_params.h"

namespace rwkv {

// float stands for fp32, bf16 and fp16 tensors; double for fp64 tensors alone.
template <class Real>
struct RawElement;
template <>
struct RawElement<float> {
  uint32_t bits;
};
template <>
struct RawElement<double> {
  double value;
};

template <class Real>
__device__ __forceinline__ RawElement<Real> load_raw(const View& view, int64_t offset);
template <>
__device__ __forceinline__ RawElement<float> load_raw<float>(const View& view, int64_t offset) {
  if (view.dtype == Dtype::kFloat32) return {load_global<uint32_t>(static_cast<const float*>(view.data) + offset)};
  return {load_global<uint16_t>(static_cast<const uint16_t*>(view.data) + offset)};
}
template <>
__device__ __forceinline__ RawElement<double> load_raw<double>(const View& view, int64_t offset) {
  return {load_global<double>(static_cast<const double*>(view.data) + offset)};
}

__device__ __forceinline__ float element_value(RawElement<float> raw, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return float_from_bits(raw.bits);
  return dtype == Dtype::kBFloat16 ? unpack<BFloat16>(raw.bits).x : unpack<Float16>(raw.bits).x;
}
__device__ __forceinline__ double element_value(RawElement<double> raw, Dtype) { return raw.value; }

template <class Real>
__device__ __forceinline__ Real load_element(const View& view, int64_t offset) {
  return element_value(load_raw<Real>(view, offset), view.dtype);
}

// Rounds to nearest even.
__device__ __forceinline__ void store_element(const View& view, int64_t offset, float value) {
  if (view.dtype == Dtype::kFloat32) {
    store_global<float>(static_cast<float*>(view.data) + offset, value);
  } else {
    const uint32_t pair = view.dtype == Dtype::kBFloat16 ? pack<BFloat16>(value, 0.0f) : pack<Float16>(value, 0.0f);
    store_global<uint16_t>(static_cast<uint16_t*>(view.data) + offset, static_cast<uint16_t>(pair));
  }
}
__device__ __forceinline__ void store_element(const View& view, int64_t offset, double value) {
  store_global<double>(static_cast<double*>(view.data) + offset, value);
}

// Element [row, token, head, 0] of a [B, T, H, N] tensor.
__device__ __forceinline__ int64_t offset_of(const View& view, int64_t row, int64_t token, int64_t head) {
  return row * view.batch_stride + token * view.token_stride + head * view.head_stride;
}

// exp to the last bit or two, unlike exp2_fast.
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// ---- four neighbours, starting at a multiple of four ----
template <class Real>
struct Four {
  Real value[4];
  __device__ __forceinline__ Real& operator[](int i) { return value[i]; }
  __device__ __forceinline__ const Real& operator[](int i) const { return value[i]; }
};

__device__ __forceinline__ Four<float> load_four_shared(const float* from) {
  const float4 x = load_shared<float4>(from);
  return {x.x, x.y, x.z, x.w};
}
__device__ __forceinline__ Four<double> load_four_shared(const double* from) {
  const double2 low = load_shared<double2>(from), high = load_shared<double2>(from + 2);
  return {low.x, low.y, high.x, high.y};
}
__device__ __forceinline__ void store_four_shared(float* to, const Four<float>& x) {
  store_shared<float4>(to, make_float4(x[0], x[1], x[2], x[3]));
}
__device__ __forceinline__ void store_four_shared(double* to, const Four<double>& x) {
  store_shared<double2>(to, make_double2(x[0], x[1]));
  store_shared<double2>(to + 2, make_double2(x[2], x[3]));
}
__device__ __forceinline__ Four<float> load_four_global(const float* from) {
  const float4 x = load_global<float4>(from);
  return {x.x, x.y, x.z, x.w};
}
__device__ __forceinline__ Four<double> load_four_global(const double* from) {
  const double2 low = load_global<double2>(from), high = load_global<double2>(from + 2);
  return {low.x, low.y, high.x, high.y};
}
__device__ __forceinline__ void store_four_global(float* to, const Four<float>& x) {
  store_global<float4>(to, make_float4(x[0], x[1], x[2], x[3]));
}
__device__ __forceinline__ void store_four_global(double* to, const Four<double>& x) {
  store_global<double2>(to, make_double2(x[0], x[1]));
  store_global<double2>(to + 2, make_double2(x[2], x[3]));
}

}  // namespace rwkv
