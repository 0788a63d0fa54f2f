// Sum of a residual stream and what a sub-module adds to it, and the sum's layer norm, in one pass (layer_params.h,
// LayerNormParams); backward computes mean and deviation again:
//   s = x + delta,   n = (s - mean) / sqrt(var + eps),   out = weight n + bias
//   dn = dout weight,   ds = (dn - mean(dn) - n mean(dn n)) / sqrt(var + eps) + dsum,   dx = ddelta = ds
//   dweight = sum dout n,   dbias = sum dout
// X is the stream's element, E that of delta and out. Included after elements.h, inside namespace rwkv::RWKV_ISA.

// Calls body with elements of the stream's and the activations' dtypes: equal, or fp32 and a 16-bit one.
template <class Body>
[[gnu::always_inline]] inline void for_stream_element(const LayerNormParams& p, const Body& body) {
  for_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(E) == 2) {
      if (p.stream_dtype == Dtype::kFloat32) return body(float(), element);
    }
    body(element, element);
  });
}

// n = (s - mean) scale.
template <class T>
struct RowScale {
  T mean, scale;

  Lanes<T> operator()(Lanes<T> s) const { return (s - mean) * scale; }
};

template <class T>
inline RowScale<T> scale_of(const LayerNormParams& p, const T* row, T sum) {
  const T mean = sum / T(p.width);
  const T square = sum_over_lanes<T>(p.width, [=](auto place) {
    const Lanes<T> centred = get(row, place) - mean;
    return centred * centred;
  });
  return {mean, T(1) / std::sqrt(square / T(p.width) + T(p.eps))};
}

template <class X, class E>
void add_layer_norm_row(const LayerNormParams& p, int64_t at, Real<E>* row) {
  using T = Real<E>;
  const X* x = static_cast<const X*>(p.x) + at * p.width;
  const E* delta = p.delta ? static_cast<const E*>(p.delta) + at * p.width : nullptr;
  X* stream = p.delta ? static_cast<X*>(p.sum) + at * p.width : nullptr;
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  E* out = static_cast<E*>(p.out) + at * p.width;
  const T sum = sum_over_lanes<T>(p.width, [=](auto place) {
    Lanes<T> s = get(x, place);
    if (delta) {
      s += get(delta, place);
      put(stream, place, s);
      if constexpr (sizeof(X) == 2) s = get<X>(stream, place);  // as rounded: backward sees no other
    }
    put(row, place, s);
    return s;
  });
  const RowScale<T> n = scale_of<T>(p, row, sum);
  for_lanes<T>(p.width, [=](auto place) {
    put(out, place, n(get<T>(row, place)) * get(weight, place) + get(bias, place));
  });
}

void add_layer_norm(const LayerNormParams& p, int64_t begin, int64_t end, void* scratch) {
  for_stream_element(p, [&](auto stream, auto element) {
    using E = decltype(element);
    for (int64_t row = begin; row < end; ++row)
      add_layer_norm_row<decltype(stream), E>(p, row, static_cast<Real<E>*>(scratch));
  });
}

template <class X, class E>
void add_layer_norm_row_backward(const LayerNormParams& p, int64_t at, Real<E>* n, Real<E>* dn, Real<E>* sums) {
  using T = Real<E>;
  const X* stream = static_cast<const X*>(p.x) + at * p.width;
  const X* dsum = p.dsum ? static_cast<const X*>(p.dsum) + at * p.width : nullptr;
  const E* dout = static_cast<const E*>(p.dout) + at * p.width;
  const T* weight = static_cast<const T*>(p.weight);
  X* dx = static_cast<X*>(p.dx) + at * p.width;
  E* ddelta = p.ddelta ? static_cast<E*>(p.ddelta) + at * p.width : nullptr;
  T *dweight = sums, *dbias = sums + p.width;
  const T total = sum_over_lanes<T>(p.width, [=](auto place) {
    const Lanes<T> s = get(stream, place);
    put(n, place, s);
    return s;
  });
  const RowScale<T> normal_of = scale_of<T>(p, n, total);
  const T scale = normal_of.scale, width = T(p.width);
  const T mean = sum_over_lanes<T>(p.width, [=](auto place) {
    const Lanes<T> upper = get(dout, place), passed = upper * get(weight, place);
    const Lanes<T> normal = normal_of(get<T>(n, place));
    put(n, place, normal);
    put(dweight, place, get<T>(dweight, place) + upper * normal);
    put(dbias, place, get<T>(dbias, place) + upper);
    put(dn, place, passed);
    return passed;
  }) / width;
  const T slope =
      sum_over_lanes<T>(p.width, [=](auto place) { return get<T>(dn, place) * get<T>(n, place); }) / width;
  for_lanes<T>(p.width, [=](auto place) {
    Lanes<T> ds = (get<T>(dn, place) - mean - get<T>(n, place) * slope) * scale;
    if (dsum) ds += get(dsum, place);
    put(dx, place, ds);
    if (ddelta) put(ddelta, place, ds);
  });
}

void add_layer_norm_backward(const LayerNormParams& p, int64_t block, void* scratch) {
  for_stream_element(p, [&](auto stream, auto element) {
    using E = decltype(element);
    const int64_t begin = block * kPartialRows;
    const int64_t end = begin + kPartialRows < p.rows ? begin + kPartialRows : p.rows;
    auto* n = static_cast<Real<E>*>(scratch);
    auto* sums = static_cast<Real<E>*>(p.partial) + block * 2 * p.width;
    for (int64_t i = 0; i < 2 * p.width; ++i) sums[i] = 0;
    for (int64_t row = begin; row < end; ++row)
      add_layer_norm_row_backward<decltype(stream), E>(p, row, n, n + p.width, sums);
  });
}
