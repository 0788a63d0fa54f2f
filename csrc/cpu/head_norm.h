// Norm of each head, scale, shift and gate in one pass (layer_params.h, HeadNormParams); backward computes mean and
// deviation again:
//   n = (y - mean) / sqrt(var + eps),   o = weight n + bias,   out = o silu(g),   silu(g) = g s,   s = 1 / (1 + e^-g)
//   do = dout silu(g),   dg = dout o s (1 + g (1 - s)),   dweight = sum do n,   dbias = sum do
//   dn = do weight,   dy = (dn - mean(dn) - n mean(dn n)) / sqrt(var + eps)
// Included after elements.h, inside namespace rwkv::RWKV_ISA.

// sigmoid(x) of the places' elements.
template <class E, class Place, int kMany>
struct Sigmoids {
  Lanes<Real<E>> x[kMany], s[kMany];

  [[gnu::always_inline]] Sigmoids(const E* row, const Place (&places)[kMany]) {
    using T = Real<E>;
#pragma GCC unroll 4
    for (int m = 0; m < kMany; ++m) x[m] = get(row, places[m]), s[m] = -x[m];
    exp_all(s);
#pragma GCC unroll 4
    for (int m = 0; m < kMany; ++m) s[m] = T(1) / (T(1) + s[m]);
  }
};

// Sums over the elements of a head: whole lanes, and a rest that must not count the lanes beyond it.
template <class T>
class HeadSum {
 public:
  void add(Whole, Lanes<T> x) { lanes_ += x; }
  void add(Rest place, Lanes<T> x) {
    for (int64_t i = 0; i < place.count; ++i) rest_ += x[i];
  }
  T value() const { return sum<T>(lanes_) + rest_; }

 private:
  Lanes<T> lanes_ = {};
  T rest_ = 0;
};

// Writes n of one head; returns 1 / sqrt(var + eps).
template <class E>
inline Real<E> normalise_head(const HeadNormParams& p, const E* y, Real<E>* n) {
  using T = Real<E>;
  HeadSum<T> sum, square;
  for_lanes<T>(p.head_size, [&](auto place) { sum.add(place, get(y, place)); });
  const T mean = sum.value() / T(p.head_size);
  for_lanes<T>(p.head_size, [&](auto place) {
    const Lanes<T> centred = get(y, place) - mean;
    square.add(place, centred * centred);
    put(n, place, centred);
  });
  const T scale = T(1) / std::sqrt(square.value() / T(p.head_size) + T(p.eps));
  for_lanes<T>(p.head_size, [&](auto place) { put(n, place, get<T>(n, place) * scale); });
  return scale;
}

template <class E>
void head_norm_gate_row(const HeadNormParams& p, int64_t row, Real<E>* n) {
  using T = Real<E>;
  const int64_t width = p.heads * p.head_size;
  const E *y = static_cast<const E*>(p.y) + row * width, *gate = static_cast<const E*>(p.gate) + row * width;
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  E* out = static_cast<E*>(p.out) + row * width;
  for (int64_t head = 0; head < p.heads; ++head)
    normalise_head(p, y + head * p.head_size, n + head * p.head_size);
  for_lanes_together<T>(width, [=](const auto& places) {
    const Sigmoids gates(gate, places);
    for (size_t m = 0; m < std::size(places); ++m) {
      const Lanes<T> o = get(weight, places[m]) * get<T>(n, places[m]) + get(bias, places[m]);
      put(out, places[m], o * (gates.x[m] * gates.s[m]));
    }
  });
}

void head_norm_gate(const HeadNormParams& p, int64_t begin, int64_t end, void* scratch) {
  for_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t row = begin; row < end; ++row) head_norm_gate_row<E>(p, row, static_cast<Real<E>*>(scratch));
  });
}

template <class E>
void head_norm_gate_row_backward(const HeadNormParams& p, int64_t row, Real<E>* n, Real<E>* dn, Real<E>* sums) {
  using T = Real<E>;
  const int64_t width = p.heads * p.head_size, size = p.head_size;
  const E *y = static_cast<const E*>(p.y) + row * width, *gate = static_cast<const E*>(p.gate) + row * width;
  const E* dout = static_cast<const E*>(p.dout) + row * width;
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  E *dy = static_cast<E*>(p.dy) + row * width, *dgate = static_cast<E*>(p.dgate) + row * width;
  T *dweight = sums, *dbias = sums + width;
  for (int64_t head = 0; head < p.heads; ++head) {
    const int64_t at = head * size;
    const T scale = normalise_head(p, y + at, n + at);
    HeadSum<T> sum, dot;
    for_lanes_together<T>(size, [&](const auto& places) {
      const Sigmoids gates(gate + at, places);
      for (size_t m = 0; m < std::size(places); ++m) {
        const auto place = places[m];
        const Lanes<T> g = gates.x[m], s = gates.s[m], normal = get<T>(n + at, place);
        const Lanes<T> upper = get(dout + at, place), scaled = get(weight + at, place);
        const Lanes<T> inner = upper * (g * s), passed = inner * scaled;
        put(dgate + at, place, upper * (scaled * normal + get(bias + at, place)) * (s * (T(1) + g * (T(1) - s))));
        put(dweight + at, place, get<T>(dweight + at, place) + inner * normal);
        put(dbias + at, place, get<T>(dbias + at, place) + inner);
        put(dn + at, place, passed);
        sum.add(place, passed);
        dot.add(place, passed * normal);
      }
    });
    const T mean = sum.value() / T(size), slope = dot.value() / T(size);
    for_lanes<T>(size, [&](auto place) {
      put(dy + at, place, (get<T>(dn + at, place) - mean - get<T>(n + at, place) * slope) * scale);
    });
  }
}

void head_norm_gate_backward(const HeadNormParams& p, int64_t block, void* scratch) {
  for_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t width = p.heads * p.head_size, begin = block * kPartialRows;
    const int64_t end = begin + kPartialRows < p.rows ? begin + kPartialRows : p.rows;
    auto* rows = static_cast<Real<E>*>(scratch);
    auto* sums = static_cast<Real<E>*>(p.partial) + block * 2 * width;
    for (int64_t i = 0; i < 2 * width; ++i) sums[i] = 0;
    for (int64_t row = begin; row < end; ++row) head_norm_gate_row_backward<E>(p, row, rows, rows + width, sums);
  });
}
