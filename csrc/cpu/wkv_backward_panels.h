// What the backward pass (wkv_backward.h) does to one panel of keys: S, G, their layout and the pass over both.
// Included after wkv_forward.h, inside rwkv::RWKV_ISA.

// Some columns of a state or adjoint [key i][value j] to [panel][j][lanes], width >= columns of them, and back.
template <class T>
inline void load_keys_in_lanes(T* to, const T* from, int64_t size, int64_t stride, int64_t columns, int64_t width) {
  std::memset(to, 0, size_t(stride * width) * sizeof(T));
  for (int64_t i = 0; i < size; ++i) {
    T* lane = to + i / kLanes<T> * kLanes<T> * width + i % kLanes<T>;
    for (int64_t j = 0; j < columns; ++j) lane[j * kLanes<T>] = from[i * size + j];
  }
}

template <class T>
inline void store_keys_from_lanes(T* to, const T* from, int64_t size, int64_t columns, int64_t width) {
  for (int64_t i = 0; i < size; ++i) {
    const T* lane = from + i / kLanes<T> * kLanes<T> * width + i % kLanes<T>;
    for (int64_t j = 0; j < columns; ++j) to[i * size + j] = lane[j * kLanes<T>];
  }
}

// The state after a block, one panel of keys.
template <class T, int kSize>
inline void next_state(FoldedKeys<T> keys, const T* v, const T* from, T* to, int64_t columns, int64_t stride) {
  if constexpr (kSize > 0) stride = kSize;
#pragma GCC unroll 4
  for (int64_t j = 0; j < columns; ++j, ++v, from += kLanes<T>, to += kLanes<T>) {
    Lanes<T> next = keys.decay * load<T>(from);
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) next = multiply_add(keys.k[t], broadcast(v[t * stride]), next);
    store<T>(to, next);
  }
}

// One panel of keys and some columns: d, g and x, and G in place.
template <class T>
struct PanelSums {
  Lanes<T> d[kBlock] = {}, g[kBlock] = {}, x = {};
};

template <class T, int kSize>
inline PanelSums<T> reverse_panel(const Lanes<T> (&folded_r)[kBlock], Lanes<T> decay, const T* v, const T* dy,
                                  const T* state, T* adjoint, int64_t columns, int64_t stride) {
  if constexpr (kSize > 0) stride = kSize;
  PanelSums<T> sums;
#pragma GCC unroll 2
  for (int64_t j = 0; j < columns; ++j, ++v, ++dy, state += kLanes<T>, adjoint += kLanes<T>) {
    const Lanes<T> old_state = load<T>(state), old_adjoint = load<T>(adjoint);
    Lanes<T> next = decay * old_adjoint;
    sums.x = multiply_add(old_state, old_adjoint, sums.x);
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) {
      const Lanes<T> q = broadcast(dy[t * stride]);
      sums.d[t] = multiply_add(q, old_state, sums.d[t]);
      sums.g[t] = multiply_add(broadcast(v[t * stride]), old_adjoint, sums.g[t]);
      next = multiply_add(q, folded_r[t], next);
    }
    store<T>(adjoint, next);
  }
  return sums;
}

// sum_i k~[i] G[i, j] for kLanes columns, `panel` being the first of them in the first panel of keys.
template <class T, int kSize>
inline Lanes<T> reverse_values(const T* folded_k, const T* panel, int64_t stride, int64_t width) {
  if constexpr (kSize > 0) stride = kSize;
  Lanes<T> products[kLanes<T>] = {};
  for (int64_t i = 0; i < stride; i += kLanes<T>) {
    const Lanes<T> k = load<T>(folded_k + i);
#pragma GCC unroll 16
    for (int64_t n = 0; n < kLanes<T>; ++n)
      products[n] = multiply_add(k, load<T>(panel + i * width + n * kLanes<T>), products[n]);
  }
  return sums_of<T>(products);
}
