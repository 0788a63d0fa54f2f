// A sequence seen from outside (S, e and G as in wkv_recurrence.h and wkv_adjoint.h):
//   S_T[i,j]  = D[i] S_0[i,j] + L[i,j],   D[i] = prod_t e_t[i],   L = S_T from S_0 = 0
//   G_-1[i,j] = D[i] G_T-1[i,j] + A[i,j],                         A = G_-1 from G_T-1 = 0
// The recurrence of G is that of S with r and dy for k and v and the tokens in reverse, so one function has both.
// Included after wkv_recurrence.h, inside rwkv::RWKV_ISA.

// state[i,j] = decay[i] state[i,j] + k[i] v[j], and total[i] *= decay[i].
template <class T>
inline void summary_token(const T* k, const T* v, const T* decay, T* state, T* total, int64_t size, int64_t stride) {
  for_panels<T>(stride, [&](int64_t column, auto width) {
    constexpr int kWidth = decltype(width)::value;
    Lanes<T> value[kWidth];
    for (int p = 0; p < kWidth; ++p) value[p] = load<T>(v + column + p * kLanes<T>);
    for (int64_t i = 0; i < size; ++i) {
      T* row = state + i * stride + column;
      for (int p = 0; p < kWidth; ++p)
        store<T>(row + p * kLanes<T>, decay[i] * load<T>(row + p * kLanes<T>) + k[i] * value[p]);
    }
  });
  for (int64_t i = 0; i < stride; i += kLanes<T>) store<T>(total + i, load<T>(total + i) * load<T>(decay + i));
}

template <class T>
void summary_sequence(const WkvSummaryParams& p, const Sequence& sequence, int64_t head) {
  const int64_t size = p.shape.head_size, stride = padded(size, kLanes<T>);
  Scratch<T> scratch(size * stride + 6 * stride);
  T* state = scratch.take(size * stride);
  T *k = scratch.take(stride), *v = scratch.take(stride), *w = scratch.take(stride);
  T *rate = scratch.take(stride), *decay = scratch.take(stride), *total = scratch.take(stride);
  for (int64_t i = 0; i < stride; ++i) total[i] = T(1);
  for (int64_t t = 0; t < sequence.tokens; ++t) {
    const int64_t token = sequence.first_token + (p.adjoint ? sequence.tokens - 1 - t : t);
    load_row(k, p.k, sequence.row, token, head, size);
    load_row(v, p.v, sequence.row, token, head, size);
    if (t == 0 || !p.shape.constant_decay) {
      load_row(w, p.w, sequence.row, token, head, size);
      decay_row(w, rate, decay, stride);
    }
    summary_token(k, v, decay, state, total, size, stride);
  }
  const int64_t pair = sequence.index * p.shape.heads + head;
  copy_square(static_cast<T*>(p.state) + pair * size * size, size, state, stride, size);
  if (p.decay) std::memcpy(static_cast<T*>(p.decay) + pair * size, total, size_t(size) * sizeof(T));
}
