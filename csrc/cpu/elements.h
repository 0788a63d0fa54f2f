// Elements of any dtype in and out of lanes, a whole vector or the last of a row at a time. Included after lanes.h,
// inside namespace rwkv::RWKV_ISA.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What an element is computed in.
template <class E>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class E>
using Real = typename RealOf<E>::type;

// Calls body with an element of the dtype's type.
template <class Body>
[[gnu::always_inline]] inline void for_element(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(float());
    case Dtype::kFloat64: return body(double());
    case Dtype::kBFloat16: return body(BFloat16());
    case Dtype::kFloat16: return body(Float16());
  }
}

typedef uint16_t Halves __attribute__((vector_size(RWKV_LANE_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(RWKV_LANE_BYTES)));

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Lanes<float> widened(const float* from) { return load<float>(from); }
inline Lanes<double> widened(const double* from) { return load<double>(from); }

// The compiler's own conversions of these vectors take two or three times the instructions.
inline Words words_of(const void* from) {
#if RWKV_LANE_BYTES == 64
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif RWKV_LANE_BYTES == 32
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#endif
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Words);
}

#if RWKV_LANE_BYTES == 64
// Permutations of words: lane n's upper half from word n, and back.
inline constexpr int16_t kToUpperHalves[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                               0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
inline constexpr int16_t kUpperHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                             33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};

inline Lanes<float> widened(const BFloat16* from) {
  const __m512i row = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
  return (Lanes<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_loadu_si512(kToUpperHalves), row);
}
#else
inline Lanes<float> widened(const BFloat16* from) { return bits_as<Lanes<float>>(words_of(from) << 16); }
#endif

#if RWKV_LANE_BYTES == 64
inline Lanes<float> widened(const Float16* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
#elif RWKV_LANE_BYTES == 32
inline Lanes<float> widened(const Float16* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
#else
inline Lanes<float> widened(const Float16* from) {
  const Words half = words_of(from), sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
  // As a denormal the mantissa counts units of 2^-24: converted as an integer, since denormal floats may be flushed.
  const auto mantissa = bits_as<LaneTypes<float>::Bits>(half & 0x3ff);
  const Words denormal = bits_as<Words>(__builtin_convertvector(mantissa, Lanes<float>) * 5.9604645e-8f);
  const Words normal = (half & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : rest + 0x38000000;
  return bits_as<Lanes<float>>(sign | ((half & 0x7c00) == 0 ? denormal : normal));
}
#endif

inline void narrow(float* to, Lanes<float> x) { store<float>(to, x); }
inline void narrow(double* to, Lanes<double> x) { store<double>(to, x); }

inline void store_halves(void* to, Words words) {
#if RWKV_LANE_BYTES == 64
  return _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)words));
#endif
  const Halves halves = __builtin_convertvector(words, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// To nearest, ties to even.
#if RWKV_LANE_BYTES == 64
inline void narrow(BFloat16* to, Lanes<float> x) {
  const __m512i bits = (__m512i)x;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  const __m512i halves = _mm512_permutexvar_epi16(_mm512_loadu_si512(kUpperHalves), rounded);
  _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(halves));
}
#else
inline void narrow(BFloat16* to, Lanes<float> x) {
  const Words bits = bits_as<Words>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_halves(to, x != x ? Words{} + 0x7fc0 : rounded);
}
#endif

#if RWKV_LANE_BYTES == 64
inline void narrow(Float16* to, Lanes<float> x) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif RWKV_LANE_BYTES == 32
inline void narrow(Float16* to, Lanes<float> x) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline void narrow(Float16* to, Lanes<float> x) {  // to nearest, ties to even
  const Words bits = bits_as<Words>(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  // Below 2^-14 the sum with 0.5 leaves the rounded denormal in the low bits.
  const Words denormal = bits_as<Words>(bits_as<Lanes<float>>(rest) + 0.5f) - 0x3f000000;
  const Words normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  Words half = rest < 0x38800000 ? denormal : normal;
  half = rest >= 0x477ff000 ? Words{} + 0x7c00 : half;  // 65520 and above round to inf
  half = rest > 0x7f800000 ? Words{} + 0x7e00 : half;
  store_halves(to, sign | half);
}
#endif

// Where lanes lie in a row: a whole vector, or the row's last elements, beyond which get() gives zeros.
struct Whole {
  int64_t at;
};
struct Rest {
  int64_t at, count;
};

template <class E>
inline Lanes<Real<E>> get(const E* row, Whole place) {
  return widened(row + place.at);
}

template <class E>
inline Lanes<Real<E>> get(const E* row, Rest place) {
  E buffer[kLanes<Real<E>>] = {};
  std::memcpy(buffer, row + place.at, size_t(place.count) * sizeof(E));
  return widened(buffer);
}

template <class E>
inline void put(E* row, Whole place, Lanes<Real<E>> x) {
  narrow(row + place.at, x);
}

template <class E>
inline void put(E* row, Rest place, Lanes<Real<E>> x) {
  E buffer[kLanes<Real<E>>];
  narrow(buffer, x);
  std::memcpy(row + place.at, buffer, size_t(place.count) * sizeof(E));
}

// Calls body(place) for all lanes of a row of `size` elements.
template <class T, class Body>
[[gnu::always_inline]] inline void for_lanes(int64_t size, const Body& body) {
  int64_t at = 0;
  for (; at + kLanes<T> <= size; at += kLanes<T>) body(Whole{at});
  if (at < size) body(Rest{at, size - at});
}

// Calls body(places) for all lanes of a row of `size` elements, with an array of four places or of one: for chains of
// operations that go side by side.
template <class T, class Body>
[[gnu::always_inline]] inline void for_lanes_together(int64_t size, const Body& body) {
  constexpr int64_t kMany = 4;
  int64_t at = 0;
  for (; at + kMany * kLanes<T> <= size; at += kMany * kLanes<T>) {
    const Whole places[kMany] = {{at}, {at + kLanes<T>}, {at + 2 * kLanes<T>}, {at + 3 * kLanes<T>}};
    body(places);
  }
  for_lanes<T>(size - at, [&](auto place) __attribute__((always_inline)) {
    place.at += at;
    const decltype(place) places[1] = {place};
    body(places);
  });
}

// The sum of value(place) over a row of `size` elements, in chains that do not wait for each other.
template <class T, class Value>
[[gnu::always_inline]] inline T sum_over_lanes(int64_t size, const Value& value) {
  constexpr int64_t kChains = 4;
  Lanes<T> sums[kChains] = {};
  int64_t at = 0;
  for (; at + kChains * kLanes<T> <= size; at += kChains * kLanes<T>)
#pragma GCC unroll 4
    for (int64_t n = 0; n < kChains; ++n) sums[n] += value(Whole{at + n * kLanes<T>});
  for (; at + kLanes<T> <= size; at += kLanes<T>) sums[0] += value(Whole{at});
  T rest = 0;  // what value() gives beyond the row's end does not count
  if (at < size) {
    const Lanes<T> last = value(Rest{at, size - at});
    for (int64_t lane = 0; lane < size - at; ++lane) rest += last[lane];
  }
  return sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <class E>
inline Real<E> get_one(const E* at) {
  return get(at, Rest{0, 1})[0];
}

template <class E>
inline void put_one(E* at, Real<E> x) {
  put(at, Rest{0, 1}, Lanes<Real<E>>{} + x);
}
