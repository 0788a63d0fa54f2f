// Loops whose index is a compile-time constant, so that arrays indexed by it stay in registers.
#pragma once

#include <type_traits>

namespace rwkv {

// body(std::integral_constant<int, i>) for i = kBegin, kBegin + kStep, ... before kEnd; kStep may be negative.
template <int kBegin, int kEnd, int kStep = 1, class Body>
__device__ __forceinline__ void static_for(Body&& body) {
  if constexpr (kStep > 0 ? kBegin < kEnd : kBegin > kEnd) {
    body(std::integral_constant<int, kBegin>{});
    static_for<kBegin + kStep, kEnd, kStep>(body);
  }
}

}  // namespace rwkv
