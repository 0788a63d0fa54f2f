// Tensors for the CPU kernels, with memory behind every row that AddressSanitizer lets nobody touch, and their elements
// in and out of double. Everything starts as NaN.
#pragma once

#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "wkv_params.h"

namespace rwkv {

inline int64_t bytes_of(Dtype dtype) {
  constexpr int64_t kBytes[] = {4, 8, 2, 2};
  return kBytes[int(dtype)];
}

// x must be exact in the dtype and not denormal there.
inline void encode(char* to, Dtype dtype, double x) {
  const float narrow = float(x);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  uint16_t half = uint16_t(bits >> 16);
  if (dtype == Dtype::kFloat16)
    half = x == 0 ? 0 : uint16_t((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13);
  const void* from = dtype == Dtype::kFloat64   ? static_cast<const void*>(&x)
                     : dtype == Dtype::kFloat32 ? static_cast<const void*>(&narrow)
                                                : &half;
  std::memcpy(to, from, size_t(bytes_of(dtype)));
}

inline double decode(const char* from, Dtype dtype) {
  double wide;
  float narrow;
  uint16_t half;
  if (dtype == Dtype::kFloat64) return std::memcpy(&wide, from, sizeof wide), wide;
  if (dtype == Dtype::kFloat32) return std::memcpy(&narrow, from, sizeof narrow), narrow;
  std::memcpy(&half, from, sizeof half);
  if (dtype == Dtype::kBFloat16) {
    const uint32_t bits = uint32_t(half) << 16;
    return std::memcpy(&narrow, &bits, sizeof bits), narrow;
  }
  const int exponent = half >> 10 & 31, mantissa = half & 0x3ff;
  if (exponent == 31) return std::numeric_limits<double>::quiet_NaN();
  const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -size : size;
}

// A tensor [B, T, H, N] (or [H, N]: B = T = 0) of NaN, each row followed by bytes that nobody may touch.
class GuardedRows {
 public:
  GuardedRows(Dtype dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t size)
      : dtype_(dtype), per_head_(batch == 0), row_bytes_(size * bytes_of(dtype)),
        row_stride_((row_bytes_ + 7) / 8 * 8 + 16) {
    const int64_t rows = per_head_ ? heads : batch * tokens * heads;
    const int64_t bytes = rows ? (rows - 1) * row_stride_ + row_bytes_ : 0;
    memory_ = static_cast<char*>(std::malloc(size_t(bytes)));
    std::memset(memory_, 0xff, size_t(bytes));
    for (int64_t row = 0; row + 1 < rows; ++row)
      ASAN_POISON_MEMORY_REGION(memory_ + row * row_stride_ + row_bytes_, size_t(row_stride_ - row_bytes_));
    const int64_t stride = row_stride_ / bytes_of(dtype);
    view = {memory_, dtype, per_head_ ? 0 : tokens * heads * stride, per_head_ ? 0 : heads * stride, stride};
  }
  ~GuardedRows() { std::free(memory_); }
  GuardedRows(const GuardedRows&) = delete;
  GuardedRows& operator=(const GuardedRows&) = delete;

  void set(int64_t row, int64_t token, int64_t head, int64_t i, double x) {
    encode(at(row, token, head, i), dtype_, x);
  }
  double get(int64_t row, int64_t token, int64_t head, int64_t i) const {
    return decode(at(row, token, head, i), dtype_);
  }
  View view;

 private:
  char* at(int64_t row, int64_t token, int64_t head, int64_t i) const {
    const int64_t element = row * view.batch_stride + token * view.token_stride + head * view.head_stride + i;
    return memory_ + element * bytes_of(dtype_);
  }

  Dtype dtype_;
  bool per_head_;
  int64_t row_bytes_, row_stride_;
  char* memory_;
};

// Numbers [count] in fp32 or fp64, with forbidden memory behind the last.
class Numbers {
 public:
  Numbers(bool fp64, int64_t count)
      : dtype_(fp64 ? Dtype::kFloat64 : Dtype::kFloat32), bytes_(count * bytes_of(dtype_)) {
    data = static_cast<char*>(std::malloc(size_t(bytes_)));
    std::memset(data, 0xff, size_t(bytes_));
  }
  ~Numbers() { std::free(data); }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;
  void set(int64_t at, double x) { encode(data + at * bytes_of(dtype_), dtype_, x); }
  double get(int64_t at) const { return decode(data + at * bytes_of(dtype_), dtype_); }
  bool same(const Numbers& other) const { return std::memcmp(data, other.data, size_t(bytes_)) == 0; }
  char* data;

 private:
  Dtype dtype_;
  int64_t bytes_;
};

}  // namespace rwkv
