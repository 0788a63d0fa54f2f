// The WKV recurrence, backward (S and e as in wkv_recurrence.h, G_t = dL/dS_t, q_t = dL/dy_t):
//   dr_t[i] = sum_j q_t[j] S_{t-1}[i,j] + u[i] k_t[i] (v_t . q_t)
//   dk_t[i] = sum_j v_t[j] G_t[i,j]     + u[i] r_t[i] (v_t . q_t)
//   dv_t[j] = sum_i k_t[i] G_t[i,j]     + q_t[j] sum_i r_t[i] u[i] k_t[i]
//   du[i]   = sum_t r_t[i] k_t[i] (v_t . q_t)
//   dw_t[i] = -exp(w_t[i]) e_t[i] sum_j S_{t-1}[i,j] G_t[i,j]        (0 where e underflows to 0)
//   G_{t-1}[i,j] = e_t[i] G_t[i,j] + r_t[i] q_t[j],   dstate = G_{-1}
// S runs forward and G backward, so the states are recomputed: from the saved one of each 128-token chunk to one
// every kBlockTokens, then to every token of one block at a time. Both matrices lie here as [value j][key i]: then
// dr, dk and dw add up lane by lane and only dv needs a sum across lanes. Included after wkv_recurrence.h, inside
// rwkv::RWKV_ISA.

inline constexpr int64_t kBlockTokens = 16;
inline constexpr int64_t kChunkBlocks = kChunkTokens / kBlockTokens;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
inline void transpose(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t size) {
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

// The rows of one token in arithmetic precision, and the state before it.
template <class T>
struct TokenRows {
  T *r, *k, *v, *w, *rate, *decay, *dy, *state;
};

template <class T>
inline void next_state(const T* from, T* to, const TokenRows<T>& row, int64_t size, int64_t stride) {
  for_panels<T>(stride, [&](int64_t column, auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int64_t j = 0; j < size; ++j)
      for (int p = 0; p < kWidth; ++p) {
        const int64_t i = column + p * kLanes<T>;
        store<T>(to + j * stride + i,
                 load<T>(row.decay + i) * load<T>(from + j * stride + i) + load<T>(row.k + i) * row.v[j]);
      }
  });
}

// One token in reverse, without the terms in u: dr, dk, x = sum_j S G (before the factor e), dv, and G in place.
template <class T>
inline void reverse_token(const TokenRows<T>& row, T* adjoint, T* dr, T* dk, T* dv, T* x, T* dv_lanes, int64_t size,
                          int64_t stride) {
  constexpr int kWidest = RWKV_LANE_BYTES == 64 ? 4 : 2;  // as many as the registers hold
  std::memset(dv_lanes, 0, size_t(size * kLanes<T>) * sizeof(T));
  for_panels<T, kWidest>(stride, [&](int64_t column, auto width) {
    constexpr int kWidth = decltype(width)::value;
    Lanes<T> sum_r[kWidth] = {}, sum_k[kWidth] = {}, sum_x[kWidth] = {};
    for (int64_t j = 0; j < size; ++j) {
      Lanes<T> across = load<T>(dv_lanes + j * kLanes<T>);
      for (int p = 0; p < kWidth; ++p) {
        const int64_t i = column + p * kLanes<T>;
        const Lanes<T> s = load<T>(row.state + j * stride + i), g = load<T>(adjoint + j * stride + i);
        sum_r[p] += row.dy[j] * s;
        sum_k[p] += row.v[j] * g;
        sum_x[p] += s * g;
        across += load<T>(row.k + i) * g;
        store<T>(adjoint + j * stride + i, load<T>(row.decay + i) * g + load<T>(row.r + i) * row.dy[j]);
      }
      store<T>(dv_lanes + j * kLanes<T>, across);
    }
    for (int p = 0; p < kWidth; ++p) {
      const int64_t i = column + p * kLanes<T>;
      store<T>(dr + i, sum_r[p]);
      store<T>(dk + i, sum_k[p]);
      store<T>(x + i, sum_x[p]);
    }
  });
  for (int64_t j = 0; j < size; ++j) dv[j] = sum<T>(load<T>(dv_lanes + j * kLanes<T>));
}

template <class T>
class BackwardSequence {
 public:
  BackwardSequence(const WkvBackwardParams& params, const Sequence& sequence, int64_t head)
      : p_(params), at_(sequence), head_(head), size_(params.shape.head_size), stride_(padded(size_, kLanes<T>)),
        blocks_(smaller(kChunkBlocks, (sequence.tokens + kBlockTokens - 1) / kBlockTokens)),
        rows_used_(smaller(kBlockTokens, sequence.tokens)),
        scratch_((1 + blocks_ + rows_used_) * size_ * stride_ + (7 * rows_used_ + 8) * stride_ + size_ * kLanes<T>) {
    const int64_t square = size_ * stride_;
    adjoint_ = scratch_.take(square);
    for (int64_t block = 0; block < blocks_; ++block) block_states_[block] = scratch_.take(square);
    for (int64_t t = 0; t < rows_used_; ++t) {
      TokenRows<T>& row = rows_[t];
      row.state = scratch_.take(square);
      for (T** piece : {&row.r, &row.k, &row.v, &row.w, &row.rate, &row.decay, &row.dy})
        *piece = scratch_.take(stride_);
    }
    for (T** piece : {&u_, &dr_, &dk_, &dv_, &x_, &dw_, &du_block_, &dw_block_}) *piece = scratch_.take(stride_);
    dv_lanes_ = scratch_.take(size_ * kLanes<T>);
  }

  void run() {
    const int64_t square = size_ * size_, at = (at_.index * p_.shape.heads + head_) * square;
    load_row(u_, p_.u, 0, 0, head_, size_);
    for (int64_t t = 0; t < rows_used_ && p_.shape.constant_decay; ++t) load_decay(rows_[t], 0);
    if (p_.dstate_out) transpose(adjoint_, stride_, static_cast<const T*>(p_.dstate_out) + at, size_, size_);
    for (int64_t chunk = chunks_of(at_.tokens) - 1; chunk >= 0; --chunk) reverse_chunk(chunk);
    if (p_.dstate) transpose(static_cast<T*>(p_.dstate) + at, size_, adjoint_, stride_, size_);
  }

 private:
  void reverse_chunk(int64_t chunk) {
    const int64_t first = chunk * kChunkTokens, tokens = smaller(kChunkTokens, at_.tokens - first);
    const int64_t blocks = (tokens + kBlockTokens - 1) / kBlockTokens, square = size_ * size_;
    const int64_t saved = ((at_.first_chunk + chunk) * p_.shape.heads + head_) * square;
    transpose(block_states_[0], stride_, static_cast<const T*>(p_.chunk_states) + saved, size_, size_);
    for (int64_t block = 0; block + 1 < blocks; ++block) {
      const T* from = block_states_[block];
      for (int64_t t = 0; t < kBlockTokens; ++t) {
        load_state_rows(rows_[t], first + block * kBlockTokens + t);
        next_state(from, block_states_[block + 1], rows_[t], size_, stride_);
        from = block_states_[block + 1];
      }
    }
    for (int64_t block = blocks - 1; block >= 0; --block)
      reverse_block(block, first + block * kBlockTokens, smaller(kBlockTokens, tokens - block * kBlockTokens));
  }

  void reverse_block(int64_t block, int64_t first, int64_t tokens) {
    std::memcpy(rows_[0].state, block_states_[block], size_t(size_ * stride_) * sizeof(T));
    for (int64_t t = 0; t < tokens; ++t) {
      load_state_rows(rows_[t], first + t);
      load_row(rows_[t].r, p_.r, at_.row, at_.first_token + first + t, head_, size_);
      if (p_.dy.data) load_row(rows_[t].dy, p_.dy, at_.row, at_.first_token + first + t, head_, size_);
      if (t + 1 < tokens) next_state(rows_[t].state, rows_[t + 1].state, rows_[t], size_, stride_);
    }
    for (int64_t t = tokens - 1; t >= 0; --t) reverse_row(rows_[t], at_.first_token + first + t);
    // fp32 sums stay inside a block; the sequence's own sums are fp64.
    const int64_t at = (at_.index * p_.shape.heads + head_) * size_;
    flush(du_block_, p_.du_partial + at);
    if (p_.dw_partial) flush(dw_block_, p_.dw_partial + at);
  }

  void reverse_row(const TokenRows<T>& row, int64_t token) {
    reverse_token(row, adjoint_, dr_, dk_, dv_, x_, dv_lanes_, size_, stride_);
    const T vq = dot(row.v, row.dy, stride_);
    T bonus = 0;
    for (int64_t i = 0; i < stride_; i += kLanes<T>) {
      const Lanes<T> r = load<T>(row.r + i), k = load<T>(row.k + i), u = load<T>(u_ + i), rate = load<T>(row.rate + i);
      const Lanes<T> decay = load<T>(row.decay + i);
      bonus += sum<T>(r * u * k);
      store<T>(dr_ + i, load<T>(dr_ + i) + vq * u * k);
      store<T>(dk_ + i, load<T>(dk_ + i) + vq * u * r);
      store<T>(du_block_ + i, load<T>(du_block_ + i) + vq * r * k);
      const Lanes<T> dw = decay == T(0) ? Lanes<T>{} : -rate * (decay * load<T>(x_ + i));
      store<T>(dw_ + i, dw);
      store<T>(dw_block_ + i, load<T>(dw_block_ + i) + dw);
    }
    for (int64_t j = 0; j < size_; ++j) dv_[j] += bonus * row.dy[j];
    store_row(dr_, p_.dr, at_.row, token, head_, size_);
    store_row(dk_, p_.dk, at_.row, token, head_, size_);
    store_row(dv_, p_.dv, at_.row, token, head_, size_);
    if (p_.dw.data) store_row(dw_, p_.dw, at_.row, token, head_, size_);
  }

  void load_state_rows(const TokenRows<T>& row, int64_t token) {  // what next_state() reads
    load_row(row.k, p_.k, at_.row, at_.first_token + token, head_, size_);
    load_row(row.v, p_.v, at_.row, at_.first_token + token, head_, size_);
    if (!p_.shape.constant_decay) load_decay(row, token);
  }

  void load_decay(const TokenRows<T>& row, int64_t token) {
    load_row(row.w, p_.w, at_.row, at_.first_token + token, head_, size_);
    decay_row(row.w, row.rate, row.decay, stride_);
  }

  void flush(T* block, double* total) {
    for (int64_t i = 0; i < size_; ++i) total[i] += double(block[i]);
    std::memset(block, 0, size_t(stride_) * sizeof(T));
  }

  const WkvBackwardParams& p_;
  const Sequence& at_;
  const int64_t head_, size_, stride_;
  const int64_t blocks_, rows_used_;  // of the arrays below, no more than the sequence fills
  Scratch<T> scratch_;
  T* adjoint_;                      // G, [N(value)][stride]
  T* block_states_[kChunkBlocks];   // the state before each block of the chunk
  TokenRows<T> rows_[kBlockTokens];
  T *u_, *dr_, *dk_, *dv_, *x_, *dw_, *du_block_, *dw_block_, *dv_lanes_;
};
