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

// One vector's part of what a token's gradient sends to its predecessor; with kAll also of what it sends to its own h,
// dlow, and its share of the weights' gradient added to sum.
template <class E, bool kAll>
[[gnu::always_inline]] inline void mix_row_backward(const MixParams& p, int64_t c, int64_t token,
                                                    Real<E>* to_previous, Real<E>* to_own, Real<E>* sum) {
  using T = Real<E>;
  const ShiftedToken<E> at(p, token);
  const T* weights = static_cast<const T*>(p.weights) + c * p.width;
  const E *dout_row = row_of<E>(p.dout[c], p, token), *low = p.low ? row_of<E>(p.low[c], p, token) : nullptr;
  E* dlow = kAll && p.dlow ? row_of<E>(p.dlow[c], p, token) : nullptr;
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

// Calls for what mix_row_backward() needs when it comes to this token's next vector or, after the last, to the token a
// group earlier: many short rows are a pattern that the processor does not foresee. Inlined, because GCC drops calls of
// functions that do no more.
template <class E>
[[gnu::always_inline]] inline void prefetch_row_after(const MixParams& p, int64_t c, int64_t token) {
  const bool is_last = ++c == p.count;
  if (is_last) c = 0, token -= kMixGroup;
  if (token < 0) return;
  const int64_t bytes = p.width * int64_t(sizeof(E)), offset = token * bytes;
  const char* dout = static_cast<const char*>(p.dout[c]) + offset;
  const char* low = p.low ? static_cast<const char*>(p.low[c]) + offset : dout;
  const char* dlow = p.dlow ? static_cast<const char*>(p.dlow[c]) + offset : dout;
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(dout + i), __builtin_prefetch(low + i), __builtin_prefetch(dlow + i, 1);
  if (!is_last) return;
  const char* h = reinterpret_cast<const char*>(ShiftedToken<E>(p, token).h);
  const char* dh = static_cast<const char*>(p.dh) + offset;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(h + i), __builtin_prefetch(dh + i, 1);
}

// A group's tokens are taken one mixed vector after the other: all vectors of one token would be more rows, at equal
// distances, than the first cache holds. scratch: what the tokens send to their predecessors, what they keep, and what
// the group's successor sends.
template <class E>
void mix_block_backward(const MixParams& p, int64_t block, Real<E>* scratch) {
  using T = Real<E>;
  const int64_t begin = block * kPartialRows, width = p.width;
  const int64_t end = begin + kPartialRows < p.tokens ? begin + kPartialRows : p.tokens;
  const auto starts = [&](int64_t token) { return token == p.tokens || p.starts_of[token] >= 0; };
  T* sums = static_cast<T*>(p.partial) + block * p.count * width;
  for (int64_t i = 0; i < p.count * width; ++i) sums[i] = 0;
  T *to_previous = scratch, *to_own = scratch + kMixGroup * width, *from_next = scratch + 2 * kMixGroup * width;
  // The next block's first token is taken here too, for what it sends back.
  if (!starts(end))
    for (int64_t c = 0; c < p.count; ++c) mix_row_backward<E, false>(p, c, end, from_next, nullptr, nullptr);
  for (int64_t last = end; last > begin; last -= kMixGroup) {
    const int64_t first = last - kMixGroup > begin ? last - kMixGroup : begin;
    for (int64_t c = 0; c < p.count; ++c)
      for (int64_t token = first; token < last; ++token) {
        const int64_t at = (token - first) * width;
        prefetch_row_after<E>(p, c, token);
        mix_row_backward<E, true>(p, c, token, to_previous + at, to_own + at, sums + c * width);
      }
    for (int64_t token = first; token < last; ++token) {
      const T *own = to_own + (token - first) * width, *sent = to_previous + (token - first) * width;
      const T* next = starts(token + 1) ? nullptr : token + 1 < last ? sent + width : from_next;
      E* dh = row_of<E>(p.dh, p, token);
      for_lanes<T>(width, [=](auto place) {
        const Lanes<T> kept = get(own, place);
        put(dh, place, next ? kept + get(next, place) : kept);
      });
      if (!p.dlast || !starts(token)) continue;
      E* dlast = row_of<E>(p.dlast, p, p.starts_of[token]);
      for_lanes<T>(width, [=](auto place) { put(dlast, place, get(sent, place)); });
    }
    std::memcpy(from_next, to_previous, size_t(width) * sizeof(T));
  }
}

void mix_backward(const MixParams& p, int64_t block, void* scratch) {
  for_element(p.dtype, [&](auto element) {
    mix_block_backward<decltype(element)>(p, block, static_cast<Real<decltype(element)>*>(scratch));
  });
}
