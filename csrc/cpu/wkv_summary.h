// A sequence seen from outside (S, e and G as in wkv_forward.h and wkv_backward.h):
//   S_T[i,j]  = D[i] S_0[i,j] + L[i,j],   D[i] = prod_t e_t[i],   L = S_T from S_0 = 0
//   G_-1[i,j] = D[i] G_T-1[i,j] + A[i,j],                         A = G_-1 from G_T-1 = 0
// The recurrence of G is that of S with r and dy for k and v and the tokens in reverse, so one class has both.
// Included after wkv_forward.h, inside rwkv::RWKV_ISA.

template <class T, int kSize>
inline void advance_panel(const T* const (&k)[kBlock], const T* decay, const T* const (&v)[kBlock], int64_t column,
                          T* state, int64_t size) {
  if constexpr (kSize > 0) size = kSize;
  Lanes<T> value[kBlock][kPanel];
#pragma GCC unroll 8
  for (int t = 0; t < kBlock; ++t)
#pragma GCC unroll 8
    for (int p = 0; p < kPanel; ++p) value[t][p] = load<T>(v[t] + column + p * kLanes<T>);
#pragma GCC unroll 2
  for (int64_t i = 0; i < size; ++i) {
    T* row = state + i * kPanelColumns<T>;
    Lanes<T> next[kPanel];
#pragma GCC unroll 8
    for (int p = 0; p < kPanel; ++p) next[p] = broadcast(decay[i]) * load<T>(row + p * kLanes<T>);
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t)
#pragma GCC unroll 8
      for (int p = 0; p < kPanel; ++p) next[p] = multiply_add(broadcast(k[t][i]), value[t][p], next[p]);
#pragma GCC unroll 8
    for (int p = 0; p < kPanel; ++p) store<T>(row + p * kLanes<T>, next[p]);
  }
}

template <class T, int kSize>
class SummarySequence {
 public:
  SummarySequence(const WkvSummaryParams& params, const Sequence& sequence, int64_t head, Columns columns)
      : p_(params), at_(sequence), head_(head), columns_(columns), size_(kSize ? kSize : params.shape.head_size),
        stride_(padded(size_, kPanelColumns<T>)), width_(padded(columns.count, kPanelColumns<T>)),
        scratch_(size_ * width_ + 3 * kBlock * stride_ + (2 * kBlock + 4) * stride_),
        k_(all_keys(params.k)), w_(all_keys(params.w)), v_(own_columns(params.v)) {
    state_ = scratch_.take_zeros(size_ * width_);
    for (T*& row : decay_) row = scratch_.take(stride_);
    for (T*& row : folded_k_) row = scratch_.take(stride_);
    folded_decay_ = scratch_.take(stride_), zeros_ = scratch_.take_zeros(stride_);
    ones_ = scratch_.take(stride_), total_ = scratch_.take(stride_);
    for (int64_t i = 0; i < stride_; ++i) ones_[i] = total_[i] = T(1);
  }

  void run() {
    for (int64_t t = 0; t < at_.tokens; t += kBlock) run_block(t);
    const int64_t pair = at_.index * p_.shape.heads + head_;
    store_state(static_cast<T*>(p_.state) + pair * size_ * size_ + columns_.first, state_, size_, columns_.count);
    if (p_.decay && columns_.first == 0)
      std::memcpy(static_cast<T*>(p_.decay) + pair * size_, total_, size_t(size_) * sizeof(T));
  }

 private:
  TokenRows<T, kSize> all_keys(const View& view) { return {view, at_.row, head_, size_, stride_, scratch_}; }
  TokenRows<T, kSize> own_columns(const View& view) {
    return {narrow(view, columns_.first), at_.row, head_, columns_.count, width_, scratch_};
  }

  // The block of tokens that starts after `done` of them.
  BlockTokens block_after(int64_t done) const {
    const int64_t step = p_.adjoint ? -1 : 1;
    return {at_.first_token + (p_.adjoint ? at_.tokens - 1 - done : done), smaller(kBlock, at_.tokens - done),
            done + kPrefetchTokens < at_.tokens ? step * kPrefetchTokens : 0, step};
  }

  void run_block(int64_t done) {
    const BlockTokens block = block_after(done);
    const T *k[kBlock], *v[kBlock], *decay[kBlock];
    for (const auto* rows : {&k_, &v_, &w_}) rows->fetch(block);
    k_.read(block, zeros_, k);
    v_.read(block, zeros_, v);
    if (!p_.shape.constant_decay || done == 0) {
      const T* w[kBlock];
      w_.read(block, zeros_, w);
      decay_rows(w, decay_, decay_, stride_);
    }
    for (int t = 0; t < kBlock; ++t) decay[t] = t < block.count ? decay_[t] : ones_;
    for (int64_t i = 0; i < stride_; i += kLanes<T>) {
      Lanes<T> k_panel[kBlock], decay_panel[kBlock];
      load_panel(k_panel, k, i);
      load_panel(decay_panel, decay, i);
      const auto folded = fold_keys<T>(k_panel, decay_panel);
#pragma GCC unroll 8
      for (int t = 0; t < kBlock; ++t) store<T>(folded_k_[t] + i, folded.k[t]);
      store<T>(folded_decay_ + i, folded.decay);
      store<T>(total_ + i, load<T>(total_ + i) * folded.decay);
    }
    const T* keys[kBlock];
    for (int t = 0; t < kBlock; ++t) keys[t] = folded_k_[t];
    for (int64_t column = 0; column < width_; column += kPanelColumns<T>)
      advance_panel<T, kSize>(keys, folded_decay_, v, column, state_ + size_ * column, size_);
  }

  const WkvSummaryParams& p_;
  const Sequence& at_;
  const int64_t head_;
  const Columns columns_;
  const int64_t size_, stride_, width_;
  Scratch<T> scratch_;
  TokenRows<T, kSize> k_, w_, v_;
  T *state_, *decay_[kBlock], *folded_k_[kBlock], *folded_decay_, *zeros_, *ones_, *total_;
};
