// Vectors of the width this translation unit is compiled for (RWKV_LANE_BYTES), and the exponential on them. Included
// after the target pragma, inside namespace rwkv::RWKV_ISA: once per width.
//
// Where two functions must reach the same bits, multiply_add() says which operations are fused; the compiler is free to
// fuse what is written with * and +, and may do so differently in different places.

template <class T>
struct LaneTypes;
template <>
struct LaneTypes<float> {
  typedef float Lanes __attribute__((vector_size(RWKV_LANE_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(RWKV_LANE_BYTES)));
};
template <>
struct LaneTypes<double> {
  typedef double Lanes __attribute__((vector_size(RWKV_LANE_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(RWKV_LANE_BYTES)));
};
template <class T>
using Lanes = typename LaneTypes<T>::Lanes;
template <class T>
constexpr int64_t kLanes = RWKV_LANE_BYTES / sizeof(T);

template <class T>
inline Lanes<T> load(const T* from) {
  Lanes<T> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <class T>
inline void store(T* to, Lanes<T> lanes) {
  std::memcpy(to, &lanes, sizeof lanes);
}

template <class T>
inline Lanes<T> broadcast(T x) {
  return x - Lanes<T>{};  // x - 0 is x, the sign of zero included, so no subtraction is left
}

// a * b + c, rounded once where the instruction set can.
#if RWKV_LANE_BYTES == 64
inline Lanes<float> multiply_add(Lanes<float> a, Lanes<float> b, Lanes<float> c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes<double> multiply_add(Lanes<double> a, Lanes<double> b, Lanes<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif RWKV_LANE_BYTES == 32
inline Lanes<float> multiply_add(Lanes<float> a, Lanes<float> b, Lanes<float> c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes<double> multiply_add(Lanes<double> a, Lanes<double> b, Lanes<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#elif defined(__aarch64__)
inline Lanes<float> multiply_add(Lanes<float> a, Lanes<float> b, Lanes<float> c) { return vfmaq_f32(c, a, b); }
inline Lanes<double> multiply_add(Lanes<double> a, Lanes<double> b, Lanes<double> c) { return vfmaq_f64(c, a, b); }
#else
template <class V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif

// The sum of all lanes, halving: the order depends on the number of lanes alone.
template <class T>
inline T sum(Lanes<T> lanes) {
#if RWKV_LANE_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_add_ps(lanes);
#elif RWKV_LANE_BYTES == 32
  if constexpr (std::is_same_v<T, float>) {  // in registers: through memory it takes as long as 300 multiply-adds
    const __m128 fours = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
    return _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)));
  }
#endif
  T part[kLanes<T>];
  std::memcpy(part, &lanes, sizeof lanes);
  for (int64_t half = kLanes<T> / 2; half; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  return part[0];
}

// Lane n of the result is the sum of all lanes of rows[n].
template <class T>
inline Lanes<T> sums_of(const Lanes<T> (&rows)[kLanes<T>]) {
  Lanes<T> sums = {};
  for (int64_t n = 0; n < kLanes<T>; ++n) sums[n] = sum<T>(rows[n]);
  return sums;
}

#if RWKV_LANE_BYTES == 64
template <>
inline Lanes<float> sums_of<float>(const Lanes<float> (&rows)[16]) {
  __m512 twos[8], fours[4];
  for (int n = 0; n < 8; ++n)
    twos[n] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * n], rows[2 * n + 1]),
                            _mm512_unpackhi_ps(rows[2 * n], rows[2 * n + 1]));
  for (int n = 0; n < 4; ++n)  // 0x44, 0xee: the low, the high halves of both
    fours[n] = _mm512_add_ps(_mm512_shuffle_ps(twos[2 * n], twos[2 * n + 1], 0x44),
                             _mm512_shuffle_ps(twos[2 * n], twos[2 * n + 1], 0xee));
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x44),
                                   _mm512_shuffle_f32x4(fours[0], fours[1], 0xee));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x44),
                                    _mm512_shuffle_f32x4(fours[2], fours[3], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}
#elif RWKV_LANE_BYTES == 32
template <>
inline Lanes<float> sums_of<float>(const Lanes<float> (&rows)[8]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(rows[4], rows[5]), _mm256_hadd_ps(rows[6], rows[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
#endif

// The smaller, the larger of the two; NaN where x is.
#if RWKV_LANE_BYTES == 64
inline Lanes<float> at_most(Lanes<float> x, float most) { return _mm512_min_ps(broadcast(most), x); }
inline Lanes<float> at_least(Lanes<float> x, float least) { return _mm512_max_ps(broadcast(least), x); }
#elif RWKV_LANE_BYTES == 32
inline Lanes<float> at_most(Lanes<float> x, float most) { return _mm256_min_ps(broadcast(most), x); }
inline Lanes<float> at_least(Lanes<float> x, float least) { return _mm256_max_ps(broadcast(least), x); }
#else
inline Lanes<float> at_most(Lanes<float> x, float most) { return x > most ? broadcast(most) : x; }
inline Lanes<float> at_least(Lanes<float> x, float least) { return x < least ? broadcast(least) : x; }
#endif

// The larger of the two, or b where one is NaN.
#if RWKV_LANE_BYTES == 64
inline Lanes<float> larger_of(Lanes<float> a, Lanes<float> b) { return _mm512_max_ps(a, b); }
inline Lanes<double> larger_of(Lanes<double> a, Lanes<double> b) { return _mm512_max_pd(a, b); }
#elif RWKV_LANE_BYTES == 32
inline Lanes<float> larger_of(Lanes<float> a, Lanes<float> b) { return _mm256_max_ps(a, b); }
inline Lanes<double> larger_of(Lanes<double> a, Lanes<double> b) { return _mm256_max_pd(a, b); }
#else
template <class V>
inline V larger_of(V a, V b) {
  return a > b ? a : b;
}
#endif

// Whether any lane of a comparison's result, each 0 or -1, is set.
template <class T>
inline bool any_of(typename LaneTypes<T>::Bits found) {
#if RWKV_LANE_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)found, (__m512i)found) != 0;
#elif RWKV_LANE_BYTES == 32
  return !_mm256_testz_si256((__m256i)found, (__m256i)found);
#else
  bool any = false;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) any |= found[lane] != 0;
  return any;
#endif
}

// Whether a lane is larger than bound, or equal to value; NaN is neither.
template <class T>
inline bool any_above(Lanes<T> x, T bound) {
  return any_of<T>(x > broadcast(bound));
}
template <class T>
inline bool any_equal(Lanes<T> x, T value) {
  return any_of<T>(x == broadcast(value));
}

// p * 2^n for whole n from -127 (AVX-512: any) to 128, where 2^-127 may count as 0 and 2^128 as infinity.
inline Lanes<float> times_power_of_two(Lanes<float> p, Lanes<float> n) {
#if RWKV_LANE_BYTES == 64
  return _mm512_scalef_ps(p, n);
#else
  using I = LaneTypes<float>::Bits;
  const I bits = (__builtin_convertvector(n, I) + 127) << 23;
  Lanes<float> scale;
  std::memcpy(&scale, &bits, sizeof bits);
  return p * scale;
#endif
}

// x = n ln 2 + f with n whole and |f| <= ln 2 / 2, and exp(f) - 1 = f + f^2 q(f), where q is the best polynomial of its
// degree (3e-9 of exp(f)). x must lie in kLeastExponent .. 89 or be NaN. One exponential is a chain of operations that
// each wait for the last: kMany of them go side by side, step by step.
template <int kMany>
struct ReducedExponents {
  Lanes<float> n[kMany], exp_minus_1[kMany];

  [[gnu::always_inline]] explicit ReducedExponents(const Lanes<float> (&x)[kMany]) {
    const Lanes<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Lanes<float> f[kMany], q[kMany];
    const auto each = [](auto step) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int m = 0; m < kMany; ++m) step(m);
    };
    each([&](int m) __attribute__((always_inline)) { n[m] = multiply_add(x[m], broadcast(1.44269504f), magic); });
    each([&](int m) __attribute__((always_inline)) { n[m] = n[m] - magic; });
    each([&](int m) __attribute__((always_inline)) { f[m] = multiply_add(n[m], broadcast(-0.693359375f), x[m]); });
    each([&](int m) __attribute__((always_inline)) { f[m] = multiply_add(n[m], broadcast(2.12194440e-4f), f[m]); });
    const auto horner = [&](float coefficient) __attribute__((always_inline)) {
      each([&](int m) __attribute__((always_inline)) { q[m] = multiply_add(q[m], f[m], broadcast(coefficient)); });
    };
    each([&](int m) __attribute__((always_inline)) { q[m] = broadcast(1.381446724e-3f); });
    horner(8.368780836e-3f);
    horner(4.166839272e-2f);
    horner(1.666651964e-1f);
    horner(4.999999404e-1f);
    each([&](int m) __attribute__((always_inline)) { exp_minus_1[m] = multiply_add(q[m], f[m] * f[m], f[m]); });
  }
};

// Below it exp() is 0: of a denormal result AVX-512 makes what the thread's mode says, others always 0.
constexpr float kLeastExponent = RWKV_LANE_BYTES == 64 ? -105.0f : -88.0f;

// exp(x) to less than 1 ulp, half an ulp near 1, where memories are long. Overflows to inf somewhere from 88.4 to
// 88.8, is 0 where the result would be denormal (see kLeastExponent), keeps NaN. kAtMost0: no x is positive.
template <bool kAtMost0 = false, int kMany>
[[gnu::always_inline]] inline void exp_all(Lanes<float> (&x)[kMany]) {
#pragma GCC unroll 16
  for (int m = 0; m < kMany; ++m) x[m] = at_least(kAtMost0 ? x[m] : at_most(x[m], 88.9f), kLeastExponent);
  const ReducedExponents<kMany> reduced(x);
#pragma GCC unroll 16
  for (int m = 0; m < kMany; ++m) x[m] = times_power_of_two(reduced.exp_minus_1[m] + 1.0f, reduced.n[m]);
}

inline Lanes<float> exp_of(Lanes<float> x) {
  Lanes<float> one[1] = {x};
  exp_all(one);
  return one[0];
}

// The same for x <= 0 or NaN.
inline Lanes<float> exp_of_at_most_0(Lanes<float> x) {
  Lanes<float> one[1] = {x};
  exp_all<true>(one);
  return one[0];
}

// exp(x) - 1, to an ulp or two near 0 as well; x as for ReducedExponents.
inline Lanes<float> exp_minus_1_of(Lanes<float> x) {
  const Lanes<float> one[1] = {x};
  const ReducedExponents<1> reduced(one);
  const Lanes<float> scale = times_power_of_two(broadcast(1.0f), reduced.n[0]);
  return multiply_add(scale, reduced.exp_minus_1[0], scale - 1.0f);
}

inline Lanes<double> exp_of(Lanes<double> x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}
inline Lanes<double> exp_of_at_most_0(Lanes<double> x) { return exp_of(x); }

template <bool = false, int kMany>
inline void exp_all(Lanes<double> (&x)[kMany]) {
  for (int m = 0; m < kMany; ++m) x[m] = exp_of(x[m]);
}
