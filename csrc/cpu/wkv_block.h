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

// The tokens of a block: first, first + step, ... in its slots 0 .. count - 1; slots beyond have none.
struct BlockTokens {
  int64_t first, count;
  int64_t ahead;  // rows of tokens so much later (or, negative, earlier) are wanted soon; 0: of none
  int64_t step = 1;

  int64_t at(int slot) const { return first + slot * step; }
};

// The rows of one (row, head) of a tensor, one per token: its own memory where that is T and is not padded, else copies
// of a block's. kSize: what their size is most of the time, or 0.
template <class T, int kSize>
class TokenRows {
 public:
  TokenRows(const View& view, int64_t row, int64_t head, int64_t size, int64_t stride, Scratch<T>& memory)
      : first_(view.data ? element(view, row, 0, head) : nullptr),
        token_bytes_(view.token_stride * bytes_of(view.dtype)), dtype_(view.dtype), size_(size), stride_(stride),
        direct_(dtype_ == kDtypeOf<T> && size == stride), copies_(memory.take_zeros(kBlock * stride)) {}

  // The rows of a block; `absent` where a slot has no token.
  void read(const BlockTokens& block, const T* absent, const T* (&rows)[kBlock]) const {
#pragma GCC unroll 8
    for (int slot = 0; slot < kBlock; ++slot)
      rows[slot] = slot >= block.count ? absent : direct_ ? own(block, slot) : copies_ + slot * stride_;
    if (direct_) return;
    const auto load = [&](int64_t size) __attribute__((always_inline)) {
      load_rows(copies_, stride_, at(block.first), block.step * token_bytes_, block.count, dtype_, size);
    };
    if (kSize > 0 && size_ == kSize)
      load(kSize);
    else
      load(size_);
  }

  // Where the rows of a block are to be written, and then handed over by wrote(); what goes to a slot without a token
  // is thrown away.
  void write(const BlockTokens& block, T* (&rows)[kBlock]) const {
#pragma GCC unroll 8
    for (int slot = 0; slot < kBlock; ++slot)
      rows[slot] = direct_ && slot < block.count ? own(block, slot) : copies_ + slot * stride_;
  }
  void wrote(const BlockTokens& block) const {
    if (direct_) return;
    const auto store = [&](int64_t size) __attribute__((always_inline)) {
      store_rows(copies_, stride_, at(block.first), block.step * token_bytes_, block.count, dtype_, size);
    };
    if (kSize > 0 && size_ == kSize)
      store(kSize);
    else
      store(size_);
  }

  // Starts to load the rows that block.ahead names. Always inlined: GCC drops calls of a function that only prefetches.
  template <bool kForWriting = false>
  [[gnu::always_inline]] void fetch(const BlockTokens& block) const {
    if (!block.ahead || !first_) return;
    const int64_t bytes = size_ * bytes_of(dtype_);
    for (int slot = 0; slot < kBlock; ++slot)
      for (int64_t byte = 0; byte < bytes; byte += 64)
        __builtin_prefetch(at(block.at(slot) + block.ahead) + byte, kForWriting);
  }

 private:
  char* at(int64_t token) const { return first_ + token * token_bytes_; }
  T* own(const BlockTokens& block, int slot) const { return reinterpret_cast<T*>(at(block.at(slot))); }

  char* first_;
  int64_t token_bytes_;
  Dtype dtype_;
  int64_t size_, stride_;
  bool direct_;
  T* copies_;
};

// rate = exp(w) and then decay = exp(-rate) of rows of whole lanes; who needs no rates gives the decays' rows for both.
template <class T, int kRows, int kWide>
[[gnu::always_inline]] inline void decay_panel(const T* const (&w)[kRows], T* const (&rate)[kRows],
                                               T* const (&decay)[kRows], int64_t column) {
  Lanes<T> e[kRows * kWide];
#pragma GCC unroll 16
  for (int n = 0; n < kRows * kWide; ++n) e[n] = load<T>(w[n / kWide] + column + n % kWide * kLanes<T>);
  exp_all(e);
#pragma GCC unroll 16
  for (int n = 0; n < kRows * kWide; ++n) {
    store<T>(rate[n / kWide] + column + n % kWide * kLanes<T>, e[n]);
    e[n] = -e[n];
  }
  exp_all<true>(e);
#pragma GCC unroll 16
  for (int n = 0; n < kRows * kWide; ++n) store<T>(decay[n / kWide] + column + n % kWide * kLanes<T>, e[n]);
}

template <class T, int kRows>
inline void decay_rows(const T* const (&w)[kRows], T* const (&rate)[kRows], T* const (&decay)[kRows],
                       int64_t stride) {
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= stride; i += 2 * kLanes<T>) decay_panel<T, kRows, 2>(w, rate, decay, i);
  for (; i < stride; i += kLanes<T>) decay_panel<T, kRows, 1>(w, rate, decay, i);
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
