// The WKV recurrence, forward (arXiv 2404.05892, section 4; S is the state, e = exp(-exp(w)) the decay, per head):
//   y_t[j]   = sum_i r_t[i] (S_{t-1}[i,j] + u[i] k_t[i] v_t[j])
//   S_t[i,j] = e_t[i] S_{t-1}[i,j] + k_t[i] v_t[j]
// Included after lanes.h, inside namespace rwkv::RWKV_ISA. Rows are padded with zeros to whole lanes, so any head
// size works and no loop has a tail. T is the arithmetic type, float or double.

inline int64_t padded(int64_t size, int64_t lanes) { return (size + lanes - 1) / lanes * lanes; }

// Calls body(first_column, panel_width) with 4, 2 or 1 lane vectors at a time; the width is a compile-time constant.
template <class T, int kWidest = 4, class Body>
inline void for_panels(int64_t size, const Body& body) {
  const int64_t lanes = kLanes<T>;
  int64_t column = 0;
  for (; column + kWidest * lanes <= size; column += kWidest * lanes)
    body(column, std::integral_constant<int, kWidest>());
  if constexpr (kWidest > 1) {
    for (; column + 2 * lanes <= size && kWidest > 2; column += 2 * lanes)
      body(column, std::integral_constant<int, 2>());
    for (; column < size; column += lanes) body(column, std::integral_constant<int, 1>());
  }
}

// exp(w) and exp(-exp(w)) of a row.
template <class T>
inline void decay_row(const T* w, T* rate, T* decay, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const Lanes<T> e = exp_of(load<T>(w + i));
    store<T>(rate + i, e);
    store<T>(decay + i, exp_of(-e));
  }
}

template <class T>
inline T dot(const T* a, const T* b, int64_t size) {
  Lanes<T> total = {};
  for (int64_t i = 0; i < size; i += kLanes<T>) total += load<T>(a + i) * load<T>(b + i);
  return sum<T>(total);
}

// One token: y and the state [size][stride] in place. bonus = sum_i r[i] u[i] k[i].
template <class T>
inline void forward_token(const T* r, const T* k, const T* v, const T* decay, T bonus, T* state, T* y, int64_t size,
                          int64_t stride) {
  for_panels<T>(stride, [&](int64_t column, auto width) {
    constexpr int kWidth = decltype(width)::value;
    Lanes<T> value[kWidth], out[kWidth];
    for (int p = 0; p < kWidth; ++p) {
      value[p] = load<T>(v + column + p * kLanes<T>);
      out[p] = bonus * value[p];
    }
    for (int64_t i = 0; i < size; ++i) {
      T* row = state + i * stride + column;
      for (int p = 0; p < kWidth; ++p) {
        const Lanes<T> s = load<T>(row + p * kLanes<T>);
        out[p] += r[i] * s;
        store<T>(row + p * kLanes<T>, decay[i] * s + k[i] * value[p]);
      }
    }
    for (int p = 0; p < kWidth; ++p) store<T>(y + column + p * kLanes<T>, out[p]);
  });
}

template <class T>
inline void copy_square(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t size) {
  for (int64_t i = 0; i < size; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, size_t(size) * sizeof(T));
}

template <class T>
void forward_sequence(const WkvForwardParams& p, const Sequence& sequence, int64_t head) {
  const int64_t size = p.shape.head_size, stride = padded(size, kLanes<T>), square = size * size;
  Scratch<T> scratch(size * stride + 9 * stride);
  T* state = scratch.take(size * stride);
  T *r = scratch.take(stride), *k = scratch.take(stride), *v = scratch.take(stride), *w = scratch.take(stride);
  T *u = scratch.take(stride), *rate = scratch.take(stride), *decay = scratch.take(stride), *y = scratch.take(stride);
  T* uk = scratch.take(stride);
  const int64_t at = (sequence.index * p.shape.heads + head) * square;
  if (p.state) copy_square(state, stride, static_cast<const T*>(p.state) + at, size, size);
  load_row(u, p.u, 0, 0, head, size);
  for (int64_t t = 0; t < sequence.tokens; ++t) {
    const int64_t token = sequence.first_token + t;
    if (p.chunk_states && t % kChunkTokens == 0) {
      const int64_t chunk = sequence.first_chunk + t / kChunkTokens;
      copy_square(static_cast<T*>(p.chunk_states) + (chunk * p.shape.heads + head) * square, size, state, stride, size);
    }
    load_row(r, p.r, sequence.row, token, head, size);
    load_row(k, p.k, sequence.row, token, head, size);
    load_row(v, p.v, sequence.row, token, head, size);
    if (t == 0 || !p.shape.constant_decay) {
      load_row(w, p.w, sequence.row, token, head, size);
      decay_row(w, rate, decay, stride);
    }
    for (int64_t i = 0; i < stride; i += kLanes<T>) store<T>(uk + i, load<T>(u + i) * load<T>(k + i));
    forward_token(r, k, v, decay, dot(r, uk, stride), state, y, size, stride);
    store_row(y, p.y, sequence.row, token, head, size);
  }
  copy_square(static_cast<T*>(p.state_out) + at, size, state, stride, size);
}

template <class T>
void step_row(const WkvStepParams& p, int64_t row, int64_t head) {
  const int64_t size = p.shape.head_size, stride = padded(size, kLanes<T>);
  const int64_t slot = p.slots ? p.slots[row] : row;
  Scratch<T> scratch(size * stride + 9 * stride);
  T *r = scratch.take(stride), *k = scratch.take(stride), *v = scratch.take(stride), *w = scratch.take(stride);
  T *u = scratch.take(stride), *rate = scratch.take(stride), *decay = scratch.take(stride), *y = scratch.take(stride);
  T* uk = scratch.take(stride);
  if (slot >= 0) {
    load_row(r, p.r, row, 0, head, size);
    load_row(k, p.k, row, 0, head, size);
    load_row(v, p.v, row, 0, head, size);
    load_row(w, p.w, row, 0, head, size);
    load_row(u, p.u, 0, 0, head, size);
    decay_row(w, rate, decay, stride);
    for (int64_t i = 0; i < stride; i += kLanes<T>) store<T>(uk + i, load<T>(u + i) * load<T>(k + i));
    T* state = static_cast<T*>(p.state) + (slot * p.shape.heads + head) * size * size;
    const T bonus = dot(r, uk, stride);
    if (stride == size) {
      forward_token(r, k, v, decay, bonus, state, y, size, stride);
    } else {
      T* square = scratch.take(size * stride);
      copy_square(square, stride, state, size, size);
      forward_token(r, k, v, decay, bonus, square, y, size, stride);
      copy_square(state, size, square, stride, size);
    }
  }
  store_row(y, p.y, row, 0, head, size);  // zeros for a skipped row
}
