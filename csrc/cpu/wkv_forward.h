// The WKV recurrence, forward (arXiv 2404.05892, section 4; S is the state, e = exp(-exp(w)) the decay, per head):
//   y_t[j]   = sum_i r_t[i] (S_{t-1}[i,j] + u[i] k_t[i] v_t[j])
//   S_t[i,j] = e_t[i] S_{t-1}[i,j] + k_t[i] v_t[j]
// in blocks of tokens, see wkv_block.h. A call has all keys and some of the value columns of one (sequence, head); no
// column's arithmetic depends on the others, so how they are divided changes no bit. Rows are padded with zeros to
// whole lanes, so any head size works and no loop has a tail. T is the arithmetic type; kSize the head size, or 0: any.

inline constexpr int kPanel = 2;  // lane vectors of value columns in one pass

template <class T>
constexpr int64_t kPanelColumns = kPanel * kLanes<T>;

// v, y or dv of some columns only.
inline View narrow(View view, int64_t first_column) {
  if (view.data) view.data = static_cast<char*>(view.data) + first_column * bytes_of(view.dtype);
  return view;
}

// The state lies in panels of columns, [panel][key i][kPanelColumns], each a contiguous piece of memory.
template <class T>
inline void load_state(T* panels, const T* from, int64_t size, int64_t columns) {
  for (int64_t column = 0; column < columns; column += kPanelColumns<T>, panels += size * kPanelColumns<T>)
    for (int64_t i = 0; i < size; ++i)
      std::memcpy(panels + i * kPanelColumns<T>, from + i * size + column,
                  size_t(smaller(kPanelColumns<T>, columns - column)) * sizeof(T));
}

template <class T>
inline void store_state(T* to, const T* panels, int64_t size, int64_t columns) {
  for (int64_t column = 0; column < columns; column += kPanelColumns<T>, panels += size * kPanelColumns<T>)
    for (int64_t i = 0; i < size; ++i)
      std::memcpy(to + i * size + column, panels + i * kPanelColumns<T>,
                  size_t(smaller(kPanelColumns<T>, columns - column)) * sizeof(T));
}

// The keys' side of a block, as the pass over a state reads it: rows [stride] of r~ (kBlock of them), k~ and W, one
// after the other, so that the inner loop needs one pointer for all.
template <class T>
struct BlockKeys {
  static constexpr int kK = kBlock, kDecay = 2 * kBlock, kRows = 2 * kBlock + 1;
  T* rows;
  T scores[kBlock][kBlock];  // A
};

template <class T>
inline void fold_block(BlockKeys<T>& keys, const T* const (&r)[kBlock], const T* const (&k)[kBlock],
                       const T* const (&decay)[kBlock], const T* u, int64_t stride) {
  Lanes<T> pairs[kBlock][kBlock];
#pragma GCC unroll 8
  for (int t = 0; t < kBlock; ++t)
#pragma GCC unroll 8
    for (int s = 0; s <= t; ++s) pairs[t][s] = Lanes<T>{};
  for (int64_t i = 0; i < stride; i += kLanes<T>) {
    Lanes<T> r_panel[kBlock], k_panel[kBlock], decay_panel[kBlock];
    load_panel(r_panel, r, i);
    load_panel(k_panel, k, i);
    load_panel(decay_panel, decay, i);
    const auto folded_r = fold_receptances<T>(r_panel, k_panel, decay_panel, load<T>(u + i), pairs);
    const auto folded_k = fold_keys<T>(k_panel, decay_panel);
    T* to = keys.rows + i;
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) {
      store<T>(to + t * stride, folded_r.r[t]);
      store<T>(to + (BlockKeys<T>::kK + t) * stride, folded_k.k[t]);
    }
    store<T>(to + BlockKeys<T>::kDecay * stride, folded_k.decay);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kBlock; ++t)
#pragma GCC unroll 8
    for (int s = 0; s <= t; ++s) keys.scores[t][s] = sum<T>(pairs[t][s]);
}

// One pass over one panel of value columns: y and the state in place.
template <class T, int kSize>
inline void forward_panel(const BlockKeys<T>& keys, const T* const (&v)[kBlock], T* const (&y)[kBlock], int64_t column,
                          T* state, int64_t size, int64_t stride) {
  if constexpr (kSize > 0) size = stride = kSize;
  Lanes<T> value[kBlock][kPanel], out[kBlock][kPanel];
#pragma GCC unroll 8
  for (int t = 0; t < kBlock; ++t)
#pragma GCC unroll 8
    for (int p = 0; p < kPanel; ++p) {
      value[t][p] = load<T>(v[t] + column + p * kLanes<T>);
      out[t][p] = broadcast<T>(keys.scores[t][0]) * value[0][p];
#pragma GCC unroll 8
      for (int s = 1; s <= t; ++s) out[t][p] = multiply_add(broadcast<T>(keys.scores[t][s]), value[s][p], out[t][p]);
    }
  const T* key = keys.rows;
#pragma GCC unroll 8
  for (int64_t i = 0; i < size; ++i, ++key, state += kPanelColumns<T>) {
    Lanes<T> old[kPanel], next[kPanel];
    const Lanes<T> decay = broadcast(key[BlockKeys<T>::kDecay * stride]);
#pragma GCC unroll 8
    for (int p = 0; p < kPanel; ++p) {
      old[p] = load<T>(state + p * kLanes<T>);
      next[p] = decay * old[p];
    }
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) {
      const Lanes<T> r = broadcast(key[t * stride]), k = broadcast(key[(BlockKeys<T>::kK + t) * stride]);
#pragma GCC unroll 8
      for (int p = 0; p < kPanel; ++p) {
        out[t][p] = multiply_add(r, old[p], out[t][p]);
        next[p] = multiply_add(k, value[t][p], next[p]);
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPanel; ++p) store<T>(state + p * kLanes<T>, next[p]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kBlock; ++t)
#pragma GCC unroll 8
    for (int p = 0; p < kPanel; ++p) store<T>(y[t] + column + p * kLanes<T>, out[t][p]);
}

template <class T, int kSize>
class ForwardSequence {
 public:
  ForwardSequence(const WkvForwardParams& params, const Sequence& sequence, int64_t head, Columns columns)
      : p_(params), at_(sequence), head_(head), columns_(columns), size_(kSize ? kSize : params.shape.head_size),
        stride_(padded(size_, kPanelColumns<T>)), width_(padded(columns.count, kPanelColumns<T>)),
        scratch_(size_ * width_ + 5 * kBlock * stride_ + BlockKeys<T>::kRows * stride_ + (kBlock + 3) * stride_),
        r_(all_keys(params.r)), k_(all_keys(params.k)), w_(all_keys(params.w)), v_(own_columns(params.v)),
        y_(own_columns(params.y)) {
    state_ = scratch_.take_zeros(size_ * width_);
    keys_.rows = scratch_.take(BlockKeys<T>::kRows * stride_);
    for (T*& row : decay_) row = scratch_.take(stride_);
    u_ = scratch_.take_zeros(stride_);
    zeros_ = scratch_.take_zeros(stride_), ones_ = scratch_.take(stride_);
    for (int64_t i = 0; i < stride_; ++i) ones_[i] = T(1);
  }

  void run() {
    const int64_t square = size_ * size_, at = (at_.index * p_.shape.heads + head_) * square + columns_.first;
    if (p_.state) load_state(state_, static_cast<const T*>(p_.state) + at, size_, columns_.count);
    load_row(u_, p_.u, 0, 0, head_, size_);
    const int64_t ahead = bytes_of(p_.r.dtype) == 2 ? 2 * kPrefetchTokens : kPrefetchTokens;  // the same bytes
    for (int64_t t = 0; t < at_.tokens; t += kBlock) {
      if (p_.chunk_states && t % kChunkTokens == 0) save_state(at_.first_chunk + t / kChunkTokens);
      run_block({at_.first_token + t, smaller(kBlock, at_.tokens - t), t + ahead < at_.tokens ? ahead : 0});
    }
    store_state(static_cast<T*>(p_.state_out) + at, state_, size_, columns_.count);
  }

 private:
  TokenRows<T, kSize> all_keys(const View& view) { return {view, at_.row, head_, size_, stride_, scratch_}; }
  TokenRows<T, kSize> own_columns(const View& view) {
    return {narrow(view, columns_.first), at_.row, head_, columns_.count, width_, scratch_};
  }

  void save_state(int64_t chunk) {
    const int64_t at = (chunk * p_.shape.heads + head_) * size_ * size_ + columns_.first;
    store_state(static_cast<T*>(p_.chunk_states) + at, state_, size_, columns_.count);
  }

  // Tokens beyond the last have r = k = v = 0 and decay 1: they leave the state as it is, to the bit.
  void run_block(const BlockTokens& block) {
    const T *r[kBlock], *k[kBlock], *v[kBlock], *decay[kBlock];
    T* y[kBlock];
    r_.read(block, zeros_, r);
    k_.read(block, zeros_, k);
    v_.read(block, zeros_, v);
    y_.write(block, y);
    // Not all at once: more misses than the core can have under way hold up what follows.
    r_.fetch(block);
    load_decays(block);
    for (int t = 0; t < kBlock; ++t) decay[t] = t < block.count ? decay_[t] : ones_;
    w_.fetch(block);
    fold_block(keys_, r, k, decay, u_, stride_);
    k_.fetch(block);
    for (int64_t column = 0; column < width_; column += kPanelColumns<T>) {
      if (column + kPanelColumns<T> >= width_) v_.fetch(block), y_.template fetch<true>(block);
      forward_panel<T, kSize>(keys_, v, y, column, state_ + size_ * column, size_, stride_);
    }
    y_.wrote(block);
  }

  void load_decays(const BlockTokens& block) {
    if (p_.shape.constant_decay && block.first > at_.first_token) return;
    const T* w[kBlock];
    w_.read(block, zeros_, w);
    decay_rows(w, decay_, decay_, stride_);
  }

  const WkvForwardParams& p_;
  const Sequence& at_;
  const int64_t head_;
  const Columns columns_;
  const int64_t size_, stride_, width_;  // keys, padded; own columns, padded
  Scratch<T> scratch_;
  TokenRows<T, kSize> r_, k_, w_, v_, y_;
  BlockKeys<T> keys_;
  T *state_, *decay_[kBlock], *u_, *zeros_, *ones_;
};
