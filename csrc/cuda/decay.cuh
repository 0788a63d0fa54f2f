// The decay exp(-exp(x)) of the raw parameter x, and the 16-token chunk that every tensor-core kernel works in.
#pragma once

#include "cuda/device_primitives.h"

namespace rwkv {

inline constexpr int kTreeTokens = 16;  // a chunk: the tree has levels 3, 2, 1, 0

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLog2Log2E = 0.5287663729448977f;
inline constexpr float kLn2 = 0.6931471805599453f;

// exp(x) log2(e): the decay is 2 to the minus this. inf where exp(x) overflows, and then the decay is 0.
__device__ __forceinline__ float decay_exponent(float x) { return exp2_fast(fmaf(x, kLog2E, kLog2Log2E)); }

__device__ __forceinline__ float decay_of(float x) { return exp2_fast(-decay_exponent(x)); }

// The gradient of x from that of the decay's logarithm, -exp(x) dlogw; exponent is decay_exponent(x). Where that is
// inf the decay is 0 and so is dlogw.
__device__ __forceinline__ float decay_gradient(float exponent, float dlogw) {
  return -kLn2 * fminf(exponent, 3e38f) * dlogw;
}

// Two neighbouring channels, as a lane holds them.
__device__ __forceinline__ float2 times(float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); }

// Two neighbouring elements of type T in shared memory.
template <class T>
__device__ __forceinline__ float2 load_pair(const T* from) {
  if constexpr (sizeof(T) == 2)
    return unpack<T>(load_shared<uint32_t>(from));
  else
    return load_shared<float2>(from);
}

}  // namespace rwkv
