// Blocks of kBlock tokens: what the WKV recurrence does to a state in one pass over it (e_t the decay, per key i):
//   S' = W S + sum_t k~_t v_t,           k~_t = k_t prod_{m>t} e_m,   W = prod_t e_t
//   y_t = r~_t S + sum_{s<=t} A[t,s] v_s,  r~_t = r_t prod_{m<t} e_m
//   A[t,s] = sum_i r_t k_s prod_{s<m<t} e_m,   A[t,t] = sum_i r_t u k_t
// Products of decays only, never a quotient: exact for every decay, where one below 1.2e-38 is 0, and so is a product.
// A pass costs 2 + 1 / kBlock multiply-adds per element of S and token, where one token at a time costs 3, and S is
// loaded and stored once per block. Included after rows.h, inside rwkv::RWKV_ISA.

// As many tokens as the registers of the instruction set carry through a pass.
inline constexpr int kBlock = RWKV_LANE_BYTES == 64 ? 4 : 2;
// Rows are fetched no earlier than that: rows of several tensors at a power of two apart share few places of a cache.
inline constexpr int kPrefetchTokens = 4;

// The rows of one (row, head) of a tensor, one per token.
class TokenRows {
 public:
  TokenRows(const View& view, int64_t row, int64_t head, int64_t size)
      : first_(view.data ? element(view, row, 0, head) : nullptr),
        token_bytes_(view.token_stride * bytes_of(view.dtype)), row_bytes_(size * bytes_of(view.dtype)),
        dtype_(view.dtype) {}

  char* at(int64_t token) const { return first_ + token * token_bytes_; }
  Dtype dtype() const { return dtype_; }
  template <int kForWriting>
  void fetch(int64_t token) const {
    const char* row = at(token);
    for (int64_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte, kForWriting);
  }

 private:
  char* first_;
  int64_t token_bytes_, row_bytes_;
  Dtype dtype_;
};

// Rows of an input for the tokens of a block: the tensor's own memory where that is T and is not padded, else copies.
// kSize: what their size is most of the time, or 0.
template <class T, int kSize>
class InputRows {
 public:
  InputRows(const TokenRows& rows, int64_t size, int64_t stride, Scratch<T>& memory)
      : rows_(rows), size_(size), stride_(stride), direct_(rows.dtype() == kDtypeOf<T> && size == stride),
        copies_(memory.take_zeros(kBlock * stride)) {}

  // fetch: the token whose row is wanted some time later, or -1.
  const T* at(int slot, int64_t token, int64_t fetch = -1) const {
    if (fetch >= 0) rows_.fetch<0>(fetch);
    if (direct_) return reinterpret_cast<const T*>(rows_.at(token));
    T* copy = copies_ + slot * stride_;
    if (kSize > 0 && size_ == kSize)
      load_row(copy, rows_.at(token), rows_.dtype(), kSize);
    else
      load_row(copy, rows_.at(token), rows_.dtype(), size_);
    return copy;
  }

 private:
  const TokenRows rows_;
  const int64_t size_, stride_;
  const bool direct_;
  T* const copies_;
};

// Rows of an output: to be filled at at(), then handed over by done().
template <class T, int kSize>
class OutputRows {
 public:
  OutputRows(const TokenRows& rows, int64_t size, int64_t stride, Scratch<T>& memory)
      : rows_(rows), size_(size), stride_(stride), direct_(rows.dtype() == kDtypeOf<T> && size == stride),
        copies_(memory.take(kBlock * stride)) {}

  // Where the row of a token that exists goes; the row of one that pads the block is thrown away.
  T* at(int slot, int64_t token, bool exists, int64_t fetch = -1) const {
    if (fetch >= 0) rows_.fetch<1>(fetch);
    return direct_ && exists ? reinterpret_cast<T*>(rows_.at(token)) : copies_ + slot * stride_;
  }
  void done(int slot, int64_t token) const {
    if (direct_) return;
    if (kSize > 0 && size_ == kSize)
      store_row(copies_ + slot * stride_, rows_.at(token), rows_.dtype(), kSize);
    else
      store_row(copies_ + slot * stride_, rows_.at(token), rows_.dtype(), size_);
  }

 private:
  const TokenRows rows_;
  const int64_t size_, stride_;
  const bool direct_;
  T* const copies_;
};

// rate = exp(w) and decay = exp(-rate) of one row.
template <class T>
inline void decay_row(const T* w, T* rate, T* decay, int64_t stride) {
  for (int64_t i = 0; i < stride; i += kLanes<T>) {
    const Lanes<T> e = exp_of(load<T>(w + i));
    store<T>(rate + i, e);
    store<T>(decay + i, exp_of(-e));
  }
}

// k~ and W of one panel of keys, and the state update that goes with them: these operations in this order, wherever a
// state is advanced, make a state the same bits however it was reached.
template <class T>
struct FoldedKeys {
  Lanes<T> k[kBlock], decay;
};

template <class T>
inline FoldedKeys<T> fold_keys(const Lanes<T> (&k)[kBlock], const Lanes<T> (&decay)[kBlock]) {
  FoldedKeys<T> folded;
  folded.k[kBlock - 1] = k[kBlock - 1];
  folded.decay = decay[kBlock - 1];
#pragma GCC unroll 8
  for (int t = kBlock - 2; t >= 0; --t) {
    folded.k[t] = k[t] * folded.decay;
    folded.decay = decay[t] * folded.decay;
  }
  return folded;
}

// Adds the terms of A for one panel of keys to pairs[t][s], s <= t, and returns r~.
template <class T>
struct FoldedReceptances {
  Lanes<T> r[kBlock];
};

template <class T>
inline FoldedReceptances<T> fold_receptances(const Lanes<T> (&r)[kBlock], const Lanes<T> (&k)[kBlock],
                                             const Lanes<T> (&decay)[kBlock], Lanes<T> u,
                                             Lanes<T> (&pairs)[kBlock][kBlock]) {
  FoldedReceptances<T> folded;
#pragma GCC unroll 8
  for (int t = 0; t < kBlock; ++t) {
    pairs[t][t] = multiply_add(r[t] * u, k[t], pairs[t][t]);
    folded.r[t] = r[t];
#pragma GCC unroll 8
    for (int s = t - 1; s >= 0; --s) {
      pairs[t][s] = multiply_add(folded.r[t], k[s], pairs[t][s]);
      folded.r[t] = folded.r[t] * decay[s];
    }
  }
  return folded;
}

template <class T>
inline void load_panel(Lanes<T> (&panel)[kBlock], const T* const (&rows)[kBlock], int64_t column) {
#pragma GCC unroll 8
  for (int t = 0; t < kBlock; ++t) panel[t] = load<T>(rows[t] + column);
}

template <class T>
inline T dot(const T* a, const T* b, int64_t stride) {
  Lanes<T> total = {};
  for (int64_t i = 0; i < stride; i += kLanes<T>) total = multiply_add(load<T>(a + i), load<T>(b + i), total);
  return sum<T>(total);
}
