// Documents in another order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rwkv {

// Copies ids[begins[i] .. begins[i] + sizes[i]) for i from 0 to count - 1 to `out`, back to back.
inline void gather_documents(const uint16_t* ids, const int64_t* begins, const int32_t* sizes, size_t count,
                             uint16_t* out) {
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(out, ids + begins[i], static_cast<size_t>(sizes[i]) * sizeof(uint16_t));
    out += sizes[i];
  }
}

}  // namespace rwkv
