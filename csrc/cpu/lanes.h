// Vectors of the width this translation unit is compiled for (RWKV_LANE_BYTES), the exponential on them, and rows of
// any dtype in and out. Included after the target pragma, inside namespace rwkv::RWKV_ISA: once per width.

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
inline T sum(Lanes<T> lanes) {
  T total = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) total += lanes[lane];
  return total;
}

// exp(x) to about 1 ulp: 2^n times a polynomial on |x - n ln 2| <= ln 2 / 2. Overflows to inf, underflows through the
// denormals to 0, keeps NaN.
inline Lanes<float> exp_of(Lanes<float> x) {
  using F = Lanes<float>;
  using I = LaneTypes<float>::Bits;
  const F zero = {};
  x = x > 89.0f ? zero + 89.0f : x;
  x = x < -104.0f ? zero - 104.0f : x;
  const F magic = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F n = (x * 1.44269504f + magic) - magic;
  const F f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = zero + 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  // 2^n in two factors, because n runs from -150 to 128.
  const I whole = __builtin_convertvector(n, I), half = whole >> 1;
  const I low = (half + 127) << 23, high = (whole - half + 127) << 23;
  F low_scale, high_scale;
  std::memcpy(&low_scale, &low, sizeof low);
  std::memcpy(&high_scale, &high, sizeof high);
  return p * low_scale * high_scale;
}

inline Lanes<double> exp_of(Lanes<double> x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bfloat16(uint16_t half) { return float_of(uint32_t(half) << 16); }

inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even
  const uint32_t bits = bits_of(value);
  return value != value ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = uint32_t(half & 0x7fff) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and is right for denormals too; inf and NaN keep a full exponent.
  const float magnitude = float_of(rest) * float_of(0x77800000);
  const uint32_t bits = (half & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : bits_of(magnitude);
  return float_of(sign | bits);
}

inline uint16_t to_float16(float value) {  // to nearest, ties to even
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  // Below 2^-14 the sum with 0.5 leaves the rounded denormal in the low bits.
  const uint32_t denormal = bits_of(float_of(rest) + 0.5f) - 0x3f000000;
  const uint32_t normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  uint32_t half = rest < 0x38800000 ? denormal : normal;
  half = rest >= 0x477ff000 ? 0x7c00 : half;  // 65520 and above round to inf
  half = rest > 0x7f800000 ? 0x7e00 : half;
  return uint16_t(sign | half);
}

inline char* element(const View& view, int64_t row, int64_t token, int64_t head) {
  static constexpr int64_t kBytes[] = {4, 8, 2, 2};
  const int64_t offset = row * view.batch_stride + token * view.token_stride + head * view.head_stride;
  return static_cast<char*>(view.data) + offset * kBytes[static_cast<int>(view.dtype)];
}

template <class T>
inline void load_row(T* to, const View& view, int64_t row, int64_t token, int64_t head, int64_t size) {
  const char* from = element(view, row, token, head);
  const auto halves = reinterpret_cast<const uint16_t*>(from);
  switch (view.dtype) {
    case Dtype::kFloat32:
      for (int64_t i = 0; i < size; ++i) to[i] = T(reinterpret_cast<const float*>(from)[i]);
      break;
    case Dtype::kFloat64:
      for (int64_t i = 0; i < size; ++i) to[i] = T(reinterpret_cast<const double*>(from)[i]);
      break;
    case Dtype::kBFloat16:
      for (int64_t i = 0; i < size; ++i) to[i] = T(from_bfloat16(halves[i]));
      break;
    case Dtype::kFloat16:
      for (int64_t i = 0; i < size; ++i) to[i] = T(from_float16(halves[i]));
      break;
  }
}

template <class T>
inline void store_row(const T* from, const View& view, int64_t row, int64_t token, int64_t head, int64_t size) {
  char* to = element(view, row, token, head);
  const auto halves = reinterpret_cast<uint16_t*>(to);
  switch (view.dtype) {
    case Dtype::kFloat32:
      for (int64_t i = 0; i < size; ++i) reinterpret_cast<float*>(to)[i] = float(from[i]);
      break;
    case Dtype::kFloat64:
      for (int64_t i = 0; i < size; ++i) reinterpret_cast<double*>(to)[i] = double(from[i]);
      break;
    case Dtype::kBFloat16:
      for (int64_t i = 0; i < size; ++i) halves[i] = to_bfloat16(float(from[i]));
      break;
    case Dtype::kFloat16:
      for (int64_t i = 0; i < size; ++i) halves[i] = to_float16(float(from[i]));
      break;
  }
}

// Zeroed, cache-line aligned memory for one kernel call, cut into pieces.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t(64)))), next_(memory_) {
    std::memset(memory_, 0, size_t(count) * sizeof(T));
  }
  ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* take(int64_t count) {
    T* piece = next_;
    next_ += count;
    return piece;
  }

 private:
  T* memory_;
  T* next_;
};
