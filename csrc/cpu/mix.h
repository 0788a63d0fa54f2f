// Token shift and interpolation in one pass (layer_params.h, MixParams):
//   out_c = base + (other - base) m_c,   m_c = weights_c + low_c
//   dm_c = dout_c (other - base),   dbase += dout_c (1 - m_c),   dother += dout_c m_c
// Included after elements.h, inside namespace rwkv::RWKV_ISA.

// One token's rows; previous is nullptr where a text starts from zeros.
template <class E>
struct ShiftedToken {
  const E *h, *previous;
  int64_t sequence;  // that starts here, or -1

  ShiftedToken(const MixParams& p, int64_t token) : sequence(p.starts_of[token]) {
    const int64_t row = token / p.tokens_per_row, t = token % p.tokens_per_row;
    h = static_cast<const E*>(p.h) + row * p.h_row_stride + t * p.h_token_stride;
    previous = h - p.h_token_stride;
    if (sequence >= 0) previous = p.last ? static_cast<const E*>(p.last) + sequence * p.width : nullptr;
  }
};

template <class E>
inline E* row_of(void* data, const MixParams& p, int64_t token) {
  return static_cast<E*>(data) + token * p.width;
}
template <class E>
inline const E* row_of(const void* data, const MixParams& p, int64_t token) {
  return static_cast<const E*>(data) + token * p.width;
}

template <class E>
void mix_token(const MixParams& p, int64_t token) {
  using T = Real<E>;
  const ShiftedToken<E> at(p, token);
  for (int64_t c = 0; c < p.count; ++c) {  // outside, so that the pointers stay in registers
    const T* weights = static_cast<const T*>(p.weights) + c * p.width;
    const E* low = p.low ? row_of<E>(p.low[c], p, token) : nullptr;
    const E *h_row = at.h, *previous_row = at.previous;
    E* out = row_of<E>(p.out[c], p, token);
    const bool reversed = p.weighs_current;
    for_lanes<T>(p.width, [=](auto place) {
      const Lanes<T> h = get(h_row, place), previous = previous_row ? get(previous_row, place) : Lanes<T>{};
      Lanes<T> m = get(weights, place);
      if (low) m += get(low, place);
      put(out, place, reversed ? previous + (h - previous) * m : h + (previous - h) * m);
    });
  }
}

void mix(const MixParams& p, int64_t begin, int64_t end) {
  for_element(p.dtype, [&](auto element) {
    for (int64_t token = begin; token < end; ++token) mix_token<decltype(element)>(p, token);
  });
}

// What a token's gradient sends to its predecessor; with kAll also dh (its own part and from_next, what its successor
// sends it, if any), dlow, and its share of the weights' gradient added to sums.
template <class E, bool kAll>
void mix_token_backward(const MixParams& p, int64_t token, Real<E>* to_previous, const Real<E>* from_next,
                        Real<E>* sums, Real<E>* to_own) {
  using T = Real<E>;
  const ShiftedToken<E> at(p, token);
  for (int64_t c = 0; c < p.count; ++c) {  // outside, so that the pointers stay in registers
    const T* weights = static_cast<const T*>(p.weights) + c * p.width;
    const E *dout_row = row_of<E>(p.dout[c], p, token), *low = p.low ? row_of<E>(p.low[c], p, token) : nullptr;
    E* dlow = kAll && p.dlow ? row_of<E>(p.dlow[c], p, token) : nullptr;
    T* sum = kAll ? sums + c * p.width : nullptr;
    const E *h_row = at.h, *previous_row = at.previous;
    // base's share is what other's leaves of dout.
    T *base_row = p.weighs_current ? to_previous : to_own, *other_row = p.weighs_current ? to_own : to_previous;
    const bool reversed = p.weighs_current, first = c == 0;
    for_lanes<T>(p.width, [=](auto place) {
      const Lanes<T> dout = get(dout_row, place);
      Lanes<T> m = get(weights, place);
      if (low) m += get(low, place);
      const Lanes<T> other = dout * m, base = dout - other;
      if (kAll || reversed) put(base_row, place, first ? base : get<T>(base_row, place) + base);
      if (kAll || !reversed) put(other_row, place, first ? other : get<T>(other_row, place) + other);
      if constexpr (kAll) {
        const Lanes<T> h = get(h_row, place), previous = previous_row ? get(previous_row, place) : Lanes<T>{};
        const Lanes<T> dm = dout * (reversed ? h - previous : previous - h);
        if (dlow) put(dlow, place, dm);
        put(sum, place, get<T>(sum, place) + dm);
      }
    });
  }
  if constexpr (kAll) {
    E* dh = row_of<E>(p.dh, p, token);
    for_lanes<T>(p.width, [=](auto place) {
      const Lanes<T> own = get<T>(to_own, place);
      put(dh, place, from_next ? own + get(from_next, place) : own);
    });
  }
}

template <class E>
void mix_block_backward(const MixParams& p, int64_t block, Real<E>* from_next, Real<E>* to_previous,
                        Real<E>* to_own) {
  using T = Real<E>;
  const int64_t begin = block * kPartialRows;
  const int64_t end = begin + kPartialRows < p.tokens ? begin + kPartialRows : p.tokens;
  const auto starts = [&](int64_t token) { return token == p.tokens || p.starts_of[token] >= 0; };
  T* sums = static_cast<T*>(p.partial) + block * p.count * p.width;
  for (int64_t i = 0; i < p.count * p.width; ++i) sums[i] = 0;
  // The next block's first token is taken here too, for what it sends back.
  if (!starts(end)) mix_token_backward<E, false>(p, end, from_next, nullptr, nullptr, nullptr);
  for (int64_t token = end - 1; token >= begin; --token) {
    mix_token_backward<E, true>(p, token, to_previous, starts(token + 1) ? nullptr : from_next, sums, to_own);
    if (p.dlast && starts(token)) {
      E* dlast = row_of<E>(p.dlast, p, p.starts_of[token]);
      for_lanes<T>(p.width, [&](auto place) { put(dlast, place, get(static_cast<const T*>(to_previous), place)); });
    }
    T* used = from_next;
    from_next = to_previous, to_previous = used;
  }
}

void mix_backward(const MixParams& p, int64_t block, void* scratch) {
  for_element(p.dtype, [&](auto element) {
    auto* rows = static_cast<Real<decltype(element)>*>(scratch);
    mix_block_backward<decltype(element)>(p, block, rows, rows + p.width, rows + 2 * p.width);
  });
}
