// One token of one head, for decoding: the recurrence of wkv_forward.h once, the state in place. It reads and writes
// every element of the state once, which is all the time it takes. Included after wkv_forward.h.

template <class T, int kSize>
inline void step_columns(const T* r, const T* k, const T* v, const T* decay, T bonus, T* state, T* y, int64_t size,
                         int64_t stride) {
  if constexpr (kSize > 0) size = stride = kSize;
  constexpr int kWide = kSize == 0 ? kPanel : kSize < 4 * kLanes<T> ? kSize / kLanes<T> : 4;
  for (int64_t column = 0; column < stride; column += kWide * kLanes<T>) {
    Lanes<T> value[kWide], out[kWide];
#pragma GCC unroll 16
    for (int p = 0; p < kWide; ++p) {
      value[p] = load<T>(v + column + p * kLanes<T>);
      out[p] = broadcast(bonus) * value[p];
    }
    for (int64_t i = 0; i < size; ++i) {
      T* row = state + i * stride + column;
#pragma GCC unroll 16
      for (int p = 0; p < kWide; ++p) {
        const Lanes<T> s = load<T>(row + p * kLanes<T>);
        out[p] = multiply_add(broadcast(r[i]), s, out[p]);
        store<T>(row + p * kLanes<T>, multiply_add(broadcast(k[i]), value[p], broadcast(decay[i]) * s));
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < kWide; ++p) store<T>(y + column + p * kLanes<T>, out[p]);
  }
}

template <class T, int kSize>
void step_row(const WkvStepParams& p, int64_t row, int64_t head) {
  const int64_t size = kSize ? kSize : p.shape.head_size, stride = padded(size, kPanelColumns<T>);
  const int64_t slot = p.slots ? p.slots[row] : row;
  Scratch<T> scratch(8 * stride + (stride == size ? 0 : size * stride));
  T *r = scratch.take_zeros(stride), *k = scratch.take_zeros(stride), *v = scratch.take_zeros(stride);
  T *w = scratch.take_zeros(stride), *u = scratch.take_zeros(stride), *y = scratch.take_zeros(stride);
  T *decay = scratch.take(stride), *ru = scratch.take(stride);
  if (slot >= 0) {
    load_row(r, p.r, row, 0, head, size);
    load_row(k, p.k, row, 0, head, size);
    load_row(v, p.v, row, 0, head, size);
    load_row(w, p.w, row, 0, head, size);
    load_row(u, p.u, 0, 0, head, size);
    decay_rows<T, 1>({w}, {decay}, {decay}, stride);
    for (int64_t i = 0; i < stride; i += kLanes<T>) store<T>(ru + i, load<T>(r + i) * load<T>(u + i));
    T* state = static_cast<T*>(p.state) + (slot * p.shape.heads + head) * size * size;
    const T bonus = dot(ru, k, stride);
    if (stride == size) {
      step_columns<T, kSize>(r, k, v, decay, bonus, state, y, size, stride);
    } else {
      T* square = scratch.take_zeros(size * stride);
      for (int64_t i = 0; i < size; ++i)
        std::memcpy(square + i * stride, state + i * size, size_t(size) * sizeof(T));
      step_columns<T, 0>(r, k, v, decay, bonus, square, y, size, stride);
      for (int64_t i = 0; i < size; ++i)
        std::memcpy(state + i * size, square + i * stride, size_t(size) * sizeof(T));
    }
  }
  store_row(y, p.y, row, 0, head, size);  // zeros for a skipped row
}
