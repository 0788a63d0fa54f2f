// The GPU's number formats in plain integer arithmetic: conversions rounded to nearest even, exact for subnormals,
// infinities and NaN (which becomes the one NaN that the hardware makes).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace emulator {

inline float float_of_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float float_of_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1fu, fraction = half & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in fp32
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t float16_of_float(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x47800000u) return sign | 0x7c00;  // 65536 and more
  if (magnitude < 0x38800000u) {                       // below 2^-14: a multiple of 2^-24
    // Adding 0.5 leaves that multiple, rounded by the addition, in the low bits.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);  // may carry into the exponent, up to infinity
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

// What a tensor core reads of a tf32 operand.
inline float tf32_operand(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffffe000u); }

inline float nearest_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return std::bit_cast<float>(0x7fffffffu);
  return tf32_operand(std::bit_cast<float>(bits + 0xfffu + (bits >> 13 & 1u)));
}

// 2^x where neither x nor the result is kept if subnormal.
inline float exp2_flushed(float x) {
  if (x != x) return std::bit_cast<float>(0x7fffffffu);
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}

}  // namespace emulator
