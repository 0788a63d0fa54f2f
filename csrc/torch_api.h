// The only file that includes torch. Everything goes through LibTorch's stable ABI (target 2.11, set by setup.py), so
// one binary serves every later torch. Names below are the whole of torch that the rest of csrc/ may use.
#pragma once

#ifndef TORCH_TARGET_VERSION
#error "TORCH_TARGET_VERSION must be defined (setup.py does)"
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>

// Weak: torch has it from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace rwkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls into torch; a failure keeps torch's own sentence, such as "CUDA out of memory. Tried to allocate ...", where
// this torch tells it (2.13 and newer), instead of naming a line of a header.
template <class Call>
Tensor in_torchs_words(const Call& call) {
  try {
    return call();
  } catch (const std::exception&) {
    const char* reason = nullptr;
    if (torch_exception_get_what_without_backtrace) reason = torch_exception_get_what_without_backtrace();
    if (!reason || !*reason) throw;
    throw std::runtime_error(reason);
  }
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return in_torchs_words([&] { return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype); });
}

inline Tensor contiguous_like(const Tensor& x) {
  return in_torchs_words([&] { return torch::stable::new_empty(x, x.sizes()); });
}

inline Tensor contiguous_copy(const Tensor& x) {
  Tensor copy = contiguous_like(x);
  torch::stable::copy_(copy, x);
  return copy;
}

inline Tensor converted(const Tensor& x, ScalarType dtype) {
  Tensor copy = in_torchs_words([&] { return torch::stable::new_empty(x, x.sizes(), dtype); });
  torch::stable::copy_(copy, x);
  return copy;
}

inline void set_zero(Tensor& x) { torch::stable::zero_(x); }

// No copy where x is contiguous already.
inline Tensor made_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : in_torchs_words([&] { return torch::stable::contiguous(x); });
}

// The same elements with a unit last stride; no copy where that already holds.
inline Tensor with_unit_last_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : made_contiguous(x);
}

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// Calls body(begin, end) over [0, count) on torch's thread pool. An exception keeps its type and text: torch's own loop
// would turn it into an opaque error.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace rwkv
