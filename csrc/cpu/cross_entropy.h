// Cross-entropy of a row of logits z against target t, and its gradient in place of the logits (L2Wrap included):
//   loss = log(sum_i exp(z_i)) - z_t,   dz_i = softmax(z)_i - [i = t] + l2wrap z_i [i = first largest]
// Included after elements.h, inside namespace rwkv::RWKV_ISA.

// A row's largest element that is not NaN, and from where to look for it: the vectors before hold smaller ones alone.
template <class T>
struct Largest {
  T value;
  int64_t from;
};

template <class E>
inline Largest<Real<E>> largest_of(const E* z, int64_t size) {
  using T = Real<E>;
  constexpr int64_t kVectors = 16;  // to look through at a time, in chains that do not wait for each other
  constexpr int64_t kChains = 4;
  Largest<T> found = {-std::numeric_limits<T>::infinity(), 0};
  const auto look = [&](int64_t at, Lanes<T> most) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane)
      if (most[lane] > found.value) found = {most[lane], at};
  };
  int64_t at = 0;
  for (; at + kVectors * kLanes<T> <= size; at += kVectors * kLanes<T>) {
    Lanes<T> most[kChains];
    for (int64_t i = 0; i < kChains; ++i) most[i] = broadcast(found.value);
    for (int64_t i = 0; i < kVectors; ++i)
      most[i % kChains] = larger_of(get(z, Whole{at + i * kLanes<T>}), most[i % kChains]);
    const Lanes<T> all = larger_of(larger_of(most[0], most[1]), larger_of(most[2], most[3]));
    if (any_above<T>(all, found.value)) look(at, all);
  }
  for (; at + kLanes<T> <= size; at += kLanes<T>) {
    const Lanes<T> x = get(z, Whole{at});
    if (any_above<T>(x, found.value)) look(at, x);
  }
  for (; at < size; ++at)
    if (get_one(z + at) > found.value) found = {get_one(z + at), at};
  return found;
}

template <class E>
inline int64_t first_place_of(const E* z, int64_t size, Largest<Real<E>> largest) {
  using T = Real<E>;
  int64_t at = largest.from;
  while (at + kLanes<T> <= size && !any_equal<T>(get(z, Whole{at}), largest.value)) at += kLanes<T>;
  for (; at < size; ++at)
    if (get_one(z + at) == largest.value) return at;
  return 0;  // a row of NaN
}

template <class E>
void cross_entropy_row(const CrossEntropyParams& p, int64_t row, Real<E>* exps) {
  using T = Real<E>;
  E* z = static_cast<E*>(p.logits) + row * p.row_stride;
  const int64_t target = p.targets[row];
  const Largest<T> found = largest_of(z, p.vocab);
  const T largest = found.value, picked = get_one(z + target);
  const auto exponentials = [&](auto place) {
    const Lanes<T> e = exp_of_at_most_0(get(z, place) - largest);
    put(exps, place, e);
    return e;
  };
  const T total = sum_over_lanes<T>(p.vocab, exponentials);
  static_cast<T*>(p.loss)[row] = (largest - picked) + std::log(total);
  if (!p.overwrite) return;
  const int64_t at = p.l2wrap != 0 ? first_place_of(z, p.vocab, found) : 0;
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
