// Cross-entropy of a row of logits z against target t, and its gradient in place of the logits (L2Wrap included):
//   loss = log(sum_i exp(z_i)) - z_t,   dz_i = softmax(z)_i - [i = t] + l2wrap z_i [i = first largest]
// Included after elements.h, inside namespace rwkv::RWKV_ISA.

template <class E>
inline Real<E> largest_of(const E* z, int64_t size) {
  using T = Real<E>;
  const T lowest = -std::numeric_limits<T>::infinity();
  Lanes<T> most = Lanes<T>{} + lowest;
  T last = lowest;
  for_lanes<T>(size, [&](auto place) {
    if constexpr (std::is_same_v<decltype(place), Whole>) {
      const Lanes<T> x = get(z, place);
      most = x > most ? x : most;
    } else {
      for (int64_t i = place.at; i < size; ++i) last = get_one(z + i) > last ? get_one(z + i) : last;
    }
  });
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) last = most[lane] > last ? most[lane] : last;
  return last;
}

template <class E>
inline int64_t first_place_of(const E* z, int64_t size, Real<E> value) {
  using T = Real<E>;
  int64_t start = 0;  // of the vector that has it
  for (; start + kLanes<T> <= size; start += kLanes<T>) {
    const auto found = get(z, Whole{start}) == value;
    bool any = false;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) any |= found[lane] != 0;
    if (any) break;
  }
  for (int64_t i = start; i < size; ++i)
    if (get_one(z + i) == value) return i;
  return 0;  // a row of NaN
}

template <class E>
void cross_entropy_row(const CrossEntropyParams& p, int64_t row, Real<E>* exps) {
  using T = Real<E>;
  E* z = static_cast<E*>(p.logits) + row * p.row_stride;
  const int64_t target = p.targets[row];
  const T largest = largest_of(z, p.vocab), picked = get_one(z + target);
  Lanes<T> sums = {};
  T rest = 0;
  for_lanes<T>(p.vocab, [&](auto place) {
    const Lanes<T> e = exp_of(get(z, place) - largest);
    put(exps, place, e);
    if constexpr (std::is_same_v<decltype(place), Whole>)
      sums += e;
    else
      for (int64_t i = 0; i < place.count; ++i) rest += e[i];
  });
  const T total = sum<T>(sums) + rest;
  static_cast<T*>(p.loss)[row] = (largest - picked) + std::log(total);
  if (!p.overwrite) return;
  const int64_t at = p.l2wrap != 0 ? first_place_of(z, p.vocab, largest) : 0;
  const T scale = T(1) / total;
  for_lanes<T>(p.vocab, [&](auto place) { put(z, place, get<T>(exps, place) * scale); });
  T gradient = exps[target] * scale - T(1);
  if (p.l2wrap != 0 && at == target) gradient += T(p.l2wrap) * largest;
  put_one(z + target, gradient);
  if (p.l2wrap != 0 && at != target) put_one(z + at, exps[at] * scale + T(p.l2wrap) * largest);
}

void cross_entropy(const CrossEntropyParams& p, int64_t begin, int64_t end, void* scratch) {
  for_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t row = begin; row < end; ++row) cross_entropy_row<E>(p, row, static_cast<Real<E>*>(scratch));
  });
}
