// The compiled instances of every kernel (instances/*.cu), declared, and the way to them from what is known at run time.
#pragma once

#include <type_traits>

#include "cuda/device_launch.h"
#include "cuda/device_primitives.h"
#include "cuda/wkv_recurrent_task.h"
#include "cuda/wkv_work.h"

namespace rwkv {

// ---- chunk kernels: activations T, decay parameter W, head size, Eagle; *_blocks: how many the device holds at once ----
template <class T, class W, int kSize, bool kConstantDecay>
int run_wkv_forward(const ForwardTask& task, void* stream);
template <class T, class W, int kSize, bool kConstantDecay>
int wkv_forward_blocks(int64_t& blocks);
template <class T, class W, int kSize, bool kConstantDecay>
int run_wkv_backward(const BackwardTask& task, void* stream);
template <class T, class W, int kSize, bool kConstantDecay>
int wkv_backward_blocks(int64_t& blocks);

// ---- recurrent kernels: arithmetic type and head size ----
template <class Real, int kSize>
int run_wkv_recurrent_forward(const ForwardTask& task, void* stream);
template <class Real, int kSize>
int wkv_recurrent_forward_blocks(int64_t& pairs);
template <class Real, int kSize>
int run_wkv_recurrent_backward(const RecurrentBackwardTask& task, void* stream);
template <class Real, int kSize>
int wkv_recurrent_backward_blocks(int64_t& pairs, int64_t& scratch_bytes);
template <class Real, int kSize>
int run_wkv_step(const WkvStepParams& params, void* stream);

// ---- from run-time values to template arguments ----

template <class T>
struct Type {
  using type = T;
};

// body(std::integral_constant<int, head size>)
template <class Body>
int with_head_size(int64_t size, const Body& body) {
  switch (size) {
    case 32: return body(std::integral_constant<int, 32>());
    case 64: return body(std::integral_constant<int, 64>());
    case 128: return body(std::integral_constant<int, 128>());
    default: return kNotSupported;
  }
}

// body(Type<Real>, std::integral_constant<int, head size>)
template <class Body>
int with_recurrent_instance(const WkvShape& shape, const Body& body) {
  return with_head_size(shape.head_size, [&](auto size) {
    return shape.fp64 ? body(Type<double>(), size) : body(Type<float>(), size);
  });
}

// body(Type<T>, Type<W>, std::integral_constant<int, head size>, std::bool_constant<Eagle>). Eagle's w is read once,
// whatever its dtype, so there is one W for it.
template <class Body>
int with_chunk_instance(const WkvShape& shape, Dtype activation, Dtype decay, const Body& body) {
  const auto with_activation = [&](auto type) {
    return with_head_size(shape.head_size, [&](auto size) {
      if (shape.constant_decay) return body(type, Type<float>(), size, std::true_type());
      if (decay == Dtype::kFloat32) return body(type, Type<float>(), size, std::false_type());
      return decay == activation ? body(type, type, size, std::false_type()) : kNotSupported;
    });
  };
  if (activation == Dtype::kBFloat16) return with_activation(Type<BFloat16>());
  if (activation == Dtype::kFloat16) return with_activation(Type<Float16>());
  return kNotSupported;
}

}  // namespace rwkv
