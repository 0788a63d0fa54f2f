// The compiled instances of every kernel (instances/*.cu), declared (those for segments: wkv_segments.h), and the way
// to them from what is known at run time.
#pragma once

#include "cuda/device_launch.h"
#include "cuda/device_primitives.h"
#include "cuda/wkv_recurrent_task.h"
#include "cuda/wkv_segments.h"
#include "cuda/wkv_work.h"

namespace rwkv {

// ---- chunk kernels: activations T, decay parameter W, head size, Eagle; *_blocks: what the device holds at once ----
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
int wkv_recurrent_forward_blocks(int64_t& pairs);  // (segment, head) pairs that the device works on at once
template <class Real, int kSize>
int run_wkv_recurrent_backward(const RecurrentBackwardTask& task, void* stream);
template <class Real, int kSize>
int wkv_recurrent_backward_needs(RecurrentBackwardNeeds& needs);
template <class Real, int kSize>
int run_wkv_recurrent_summary(const SummaryTask& task, void* stream);
template <class Real, int kSize>
int run_wkv_step(const WkvStepParams& params, void* stream);

// ---- from run-time values to template arguments ----

template <class T, class W, int kSize, bool kConstantDecay>
struct ChunkInstance {
  static int forward_blocks(int64_t& blocks) { return wkv_forward_blocks<T, W, kSize, kConstantDecay>(blocks); }
  static int backward_blocks(int64_t& blocks) { return wkv_backward_blocks<T, W, kSize, kConstantDecay>(blocks); }
  static int summary_blocks(int64_t& blocks) { return wkv_summary_blocks<T, W, kSize, kConstantDecay>(blocks); }
  static int run(const ForwardTask& task, void* stream) {
    return run_wkv_forward<T, W, kSize, kConstantDecay>(task, stream);
  }
  static int run(const BackwardTask& task, void* stream) {
    return run_wkv_backward<T, W, kSize, kConstantDecay>(task, stream);
  }
  static int run(const SummaryTask& task, void* stream) {
    return run_wkv_summary<T, W, kSize, kConstantDecay>(task, stream);
  }
};

template <class Real, int kSize>
struct RecurrentInstance {
  static int forward_blocks(int64_t& pairs) { return wkv_recurrent_forward_blocks<Real, kSize>(pairs); }
  static int backward_needs(RecurrentBackwardNeeds& needs) { return wkv_recurrent_backward_needs<Real, kSize>(needs); }
  static int run(const ForwardTask& task, void* stream) { return run_wkv_recurrent_forward<Real, kSize>(task, stream); }
  static int run(const RecurrentBackwardTask& task, void* stream) {
    return run_wkv_recurrent_backward<Real, kSize>(task, stream);
  }
  static int run(const SummaryTask& task, void* stream) { return run_wkv_recurrent_summary<Real, kSize>(task, stream); }
  static int run(const WkvStepParams& params, void* stream) { return run_wkv_step<Real, kSize>(params, stream); }
};

// body(instance)
template <template <int> class Instance, class Body>
int with_head_size(int64_t size, const Body& body) {
  switch (size) {
    case 32: return body(Instance<32>());
    case 64: return body(Instance<64>());
    case 128: return body(Instance<128>());
    default: return kNotSupported;
  }
}

template <int kSize>
using RecurrentFp32 = RecurrentInstance<float, kSize>;
template <int kSize>
using RecurrentFp64 = RecurrentInstance<double, kSize>;

template <class Body>
int with_recurrent_instance(const WkvShape& shape, const Body& body) {
  return shape.fp64 ? with_head_size<RecurrentFp64>(shape.head_size, body)
                    : with_head_size<RecurrentFp32>(shape.head_size, body);
}

template <class T, class W, bool kConstantDecay>
struct ChunkTypes {
  template <int kSize>
  using Instance = ChunkInstance<T, W, kSize, kConstantDecay>;
};

// T for 16-bit activations. Eagle's w is read once, whatever its dtype, so there is one W for it.
template <class T, class Body>
int with_chunk_types(const WkvShape& shape, bool decay_is_fp32, const Body& body) {
  if (shape.constant_decay) return with_head_size<ChunkTypes<T, float, true>::template Instance>(shape.head_size, body);
  if (decay_is_fp32) return with_head_size<ChunkTypes<T, float, false>::template Instance>(shape.head_size, body);
  return with_head_size<ChunkTypes<T, T, false>::template Instance>(shape.head_size, body);
}

template <class Body>
int with_chunk_instance(const WkvShape& shape, Dtype activation, Dtype decay, const Body& body) {
  const bool decay_is_fp32 = decay == Dtype::kFloat32;
  if (!decay_is_fp32 && decay != activation) return kNotSupported;
  if (activation == Dtype::kBFloat16) return with_chunk_types<BFloat16>(shape, decay_is_fp32, body);
  if (activation == Dtype::kFloat16) return with_chunk_types<Float16>(shape, decay_is_fp32, body);
  return kNotSupported;
}

}  // namespace rwkv
