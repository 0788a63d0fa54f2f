// The WKV recurrence, backward (S and e as in wkv_forward.h, G_t = dL/dS_t, q_t = dL/dy_t):
//   dr_t[i] = sum_j q_t[j] S_{t-1}[i,j] + u[i] k_t[i] (v_t . q_t)
//   dk_t[i] = sum_j v_t[j] G_t[i,j]     + u[i] r_t[i] (v_t . q_t)
//   dv_t[j] = sum_i k_t[i] G_t[i,j]     + q_t[j] sum_i r_t[i] u[i] k_t[i]
//   du[i]   = sum_t r_t[i] k_t[i] (v_t . q_t)
//   dw_t[i] = -exp(w_t[i]) e_t[i] sum_j S_{t-1}[i,j] G_t[i,j]        (0 where e underflows to 0)
//   G_{t-1}[i,j] = e_t[i] G_t[i,j] + r_t[i] q_t[j],   dstate = G_{-1}
// in blocks of tokens (wkv_block.h). With S the state before a block and G the adjoint after it, one pass over both has
//   d_t = S q_t,   g_s = G v_s,   x = sum_j S G,   G' = W G + sum_t r~_t q_t,   dv_s = G k~_s + sum_{t>=s} A[t,s] q_t
// and finish_block() makes dr, dk, dw of d, g and x. Sums alone, no differences: dw has no cancellation.
//
// S runs forward and G backward, so the states of a 128-token chunk are recomputed from the saved one, one per block.
// Both matrices lie as [panel of keys][value j][lanes]: dr, dk, dw add up lane by lane and only dv needs sums across.
//
// A call has all keys and some value columns. d, g and x are summed over kColumnUnit columns at a time and these sums
// added in their order, so that the result does not depend on how columns are divided. Where they are, run() leaves the
// sums in params.partial_sums, and finish() does the rest. Included after wkv_backward_panels.h, inside rwkv::RWKV_ISA.

inline constexpr int64_t kChunkBlocks = kChunkTokens / kBlock;
inline constexpr int64_t kSumTokens = 16;
inline constexpr int kSums = 2 * kBlock + 1;  // d_t, g_t and x of a block

// The rows of a block of tokens.
template <class T>
struct BlockRows {
  const T *r[kBlock], *k[kBlock], *v[kBlock], *dy[kBlock], *decay[kBlock], *rate[kBlock];
};

template <class T, int kSize>
class BackwardSequence {
 public:
  BackwardSequence(const WkvBackwardParams& params, const Sequence& sequence, int64_t head, Columns columns)
      : p_(params), at_(sequence), head_(head), columns_(columns), size_(kSize ? kSize : params.shape.head_size),
        stride_(padded(size_, kLanes<T>)), width_(padded(columns.count, kLanes<T>)),
        blocks_(smaller(kChunkBlocks, padded(sequence.tokens, kBlock) / kBlock)),
        whole_(columns.count == size_),
        scratch_((1 + blocks_) * stride_ * width_ + 9 * kBlock * stride_ + BlockKeys<T>::kRows * stride_ +
                 (2 * blocks_ * kBlock + 2 * kBlock + kSums + 4) * stride_),
        r_(all_keys(params.r)), k_(all_keys(params.k)), v_(all_keys(params.v)), w_(all_keys(params.w)),
        dy_(all_keys(params.dy)), dr_(all_keys(params.dr)), dk_(all_keys(params.dk)), dv_(own_columns(params.dv)),
        dw_(all_keys(params.dw)) {
    adjoint_ = scratch_.take_zeros(stride_ * width_);
    states_ = scratch_.take(blocks_ * stride_ * width_);
    keys_.rows = scratch_.take(BlockKeys<T>::kRows * stride_);
    decays_ = scratch_.take(blocks_ * kBlock * stride_), rates_ = scratch_.take(blocks_ * kBlock * stride_);
    values_ = scratch_.take(kBlock * stride_), gradients_ = scratch_.take(kBlock * stride_);
    sums_ = scratch_.take(kSums * stride_);
    u_ = scratch_.take_zeros(stride_), zeros_ = scratch_.take_zeros(stride_);
    du_part_ = scratch_.take_zeros(stride_), dw_part_ = scratch_.take_zeros(stride_);
    load_row(u_, p_.u, 0, 0, head_, size_);
  }

  void run() {
    const int64_t at = (at_.index * p_.shape.heads + head_) * size_ * size_ + columns_.first;
    if (p_.dstate_out)
      load_keys_in_lanes(adjoint_, static_cast<const T*>(p_.dstate_out) + at, size_, stride_, columns_.count, width_);
    for (int64_t chunk = chunks_of(at_.tokens) - 1; chunk >= 0; --chunk) {
      load_decays(chunk);
      recompute_states(chunk);
      for (int64_t block = blocks_of(chunk) - 1; block >= 0; --block) reverse_block(chunk, block);
    }
    if (p_.dstate) store_keys_from_lanes(static_cast<T*>(p_.dstate) + at, adjoint_, size_, columns_.count, width_);
  }

  // After run() of all columns, in another call that has none of them.
  void finish() {
    for (int64_t chunk = chunks_of(at_.tokens) - 1; chunk >= 0; --chunk) {
      load_decays(chunk);
      for (int64_t block = blocks_of(chunk) - 1; block >= 0; --block) {
        add_partial_sums(chunk, block);
        finish_block(chunk, block, rows_of(chunk, block));
      }
    }
  }

 private:
  TokenRows<T, kSize> all_keys(const View& view) { return {view, at_.row, head_, size_, stride_, scratch_}; }
  TokenRows<T, kSize> own_columns(const View& view) {
    return {narrow(view, columns_.first), at_.row, head_, columns_.count, width_, scratch_};
  }

  int64_t tokens_of(int64_t chunk) const { return smaller(kChunkTokens, at_.tokens - chunk * kChunkTokens); }
  int64_t blocks_of(int64_t chunk) const { return (tokens_of(chunk) + kBlock - 1) / kBlock; }
  int64_t token_of(int64_t chunk, int64_t block) const { return chunk * kChunkTokens + block * kBlock; }

  // The tokens of a block; blocks are gone through from the last to the first.
  BlockTokens tokens_in(int64_t chunk, int64_t block, int64_t ahead = kPrefetchTokens) const {
    const int64_t own = token_of(chunk, block);
    return {at_.first_token + own, smaller(kBlock, at_.tokens - own), own >= ahead ? -ahead : 0};
  }

  // Slots beyond the last token: decay 1, as if nothing happened.
  void load_decays(int64_t chunk) {
    for (int64_t block = 0; block < blocks_of(chunk); ++block) {
      const BlockTokens tokens = tokens_in(chunk, block, kChunkTokens);
      for (const auto* rows : {&w_, &k_, &v_}) rows->fetch(tokens);  // what begins with the chunk before
      const T* w[kBlock];
      T *rate[kBlock], *decay[kBlock];
      for (int t = 0; t < kBlock; ++t) {
        rate[t] = rates_ + (block * kBlock + t) * stride_;
        decay[t] = decays_ + (block * kBlock + t) * stride_;
      }
      if (!p_.shape.constant_decay || block == 0) {
        w_.read(tokens, zeros_, w);
        decay_rows(w, rate, decay, stride_);
      } else {
        std::memcpy(rate[0], rates_, size_t(kBlock * stride_) * sizeof(T));
        std::memcpy(decay[0], decays_, size_t(kBlock * stride_) * sizeof(T));
      }
      for (int64_t t = tokens.count; t < kBlock; ++t)
        for (int64_t i = 0; i < stride_; ++i) rate[t][i] = T(0), decay[t][i] = T(1);
    }
  }

  // The state before each block of a chunk.
  void recompute_states(int64_t chunk) {
    const int64_t pair = (at_.first_chunk + chunk) * p_.shape.heads + head_, square = stride_ * width_;
    load_keys_in_lanes(states_, static_cast<const T*>(p_.chunk_states) + pair * size_ * size_ + columns_.first, size_,
                       stride_, columns_.count, width_);
    for (int64_t block = 0; block + 1 < blocks_of(chunk); ++block) {
      const T *k[kBlock], *v[kBlock], *decay[kBlock];
      const BlockTokens tokens = tokens_in(chunk, block);
      k_.read(tokens, zeros_, k);
      v_.read(tokens, zeros_, v);
      for (int t = 0; t < kBlock; ++t) decay[t] = decays_ + (block * kBlock + t) * stride_;
      gather(values_, v);
      for (int64_t i = 0; i < stride_; i += kLanes<T>) {
        Lanes<T> k_panel[kBlock], decay_panel[kBlock];
        load_panel(k_panel, k, i);
        load_panel(decay_panel, decay, i);
        T* from = states_ + block * square + i * width_;
        next_state<T, kSize>(fold_keys<T>(k_panel, decay_panel), values_, from, from + square, width_, stride_);
      }
    }
  }

  BlockRows<T> rows_of(int64_t chunk, int64_t block) {
    BlockRows<T> rows;
    const BlockTokens tokens = tokens_in(chunk, block);
    r_.fetch(tokens);
    r_.read(tokens, zeros_, rows.r);
    k_.read(tokens, zeros_, rows.k);
    v_.read(tokens, zeros_, rows.v);
    if (p_.dy.data) dy_.read(tokens, zeros_, rows.dy);
    for (int t = 0; t < kBlock; ++t) {
      if (!p_.dy.data) rows.dy[t] = zeros_;
      rows.decay[t] = decays_ + (block * kBlock + t) * stride_;
      rows.rate[t] = rates_ + (block * kBlock + t) * stride_;
    }
    return rows;
  }

  void reverse_block(int64_t chunk, int64_t block) {
    const BlockRows<T> rows = rows_of(chunk, block);
    fold_block(keys_, rows.r, rows.k, rows.decay, u_, stride_);
    dy_.fetch(tokens_in(chunk, block));
    gather(values_, rows.v);
    gather(gradients_, rows.dy);
    write_dv(chunk, block);
    for (int64_t i = 0; i < stride_; i += kLanes<T>) {
      Lanes<T> folded_r[kBlock];
#pragma GCC unroll 8
      for (int t = 0; t < kBlock; ++t) folded_r[t] = load<T>(keys_.rows + t * stride_ + i);
      const Lanes<T> decay = load<T>(keys_.rows + BlockKeys<T>::kDecay * stride_ + i);
      for (int64_t j = 0; j < width_; j += kColumnUnit) {
        const int64_t offset = i * width_ + j * kLanes<T>;
        const auto sums = reverse_panel<T, kSize>(folded_r, decay, values_ + j, gradients_ + j,
                                                  states_ + block * stride_ * width_ + offset, adjoint_ + offset,
                                                  smaller(kColumnUnit, width_ - j), stride_);
        if (whole_)
          keep_sums(sums, sums_ + i, j > 0);
        else
          keep_sums(sums, partial_sums(chunk, block, (columns_.first + j) / kColumnUnit) + i, false);
      }
    }
    if (whole_) finish_block(chunk, block, rows);
  }

  // The own columns of a block's rows, one row after the other: the inner loops need one pointer for all.
  void gather(T* to, const T* const (&rows)[kBlock]) {
    for (int t = 0; t < kBlock; ++t)
      std::memcpy(to + t * stride_, rows[t] + columns_.first, size_t(width_) * sizeof(T));
  }

  void keep_sums(const PanelSums<T>& sums, T* to, bool add) {
    const auto keep = [&](int row, Lanes<T> x) {
      store<T>(to + row * stride_, add ? load<T>(to + row * stride_) + x : x);
    };
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) keep(t, sums.d[t]), keep(kBlock + t, sums.g[t]);
    keep(2 * kBlock, sums.x);
  }

  // [units][chunks][heads][kChunkBlocks][kSums][stride]
  T* partial_sums(int64_t chunk, int64_t block, int64_t unit) {
    const int64_t pair = (unit * p_.shape.chunks + at_.first_chunk + chunk) * p_.shape.heads + head_;
    return static_cast<T*>(p_.partial_sums) + (pair * kChunkBlocks + block) * kSums * stride_;
  }

  void add_partial_sums(int64_t chunk, int64_t block) {
    std::memcpy(sums_, partial_sums(chunk, block, 0), size_t(kSums * stride_) * sizeof(T));
    for (int64_t unit = 1; unit * kColumnUnit < size_; ++unit) {
      const T* part = partial_sums(chunk, block, unit);
      for (int64_t i = 0; i < kSums * stride_; i += kLanes<T>)
        store<T>(sums_ + i, load<T>(sums_ + i) + load<T>(part + i));
    }
  }

  void write_dv(int64_t chunk, int64_t block) {
    const BlockTokens tokens = tokens_in(chunk, block);
    T* dv[kBlock];
    dv_.template fetch<true>(tokens);
    dv_.write(tokens, dv);
    for (int s = 0; s < tokens.count; ++s) {
      const T* folded_k = keys_.rows + (BlockKeys<T>::kK + s) * stride_;
      for (int64_t j = 0; j < width_; j += kLanes<T>) {
        Lanes<T> total = reverse_values<T, kSize>(folded_k, adjoint_ + j * kLanes<T>, stride_, width_);
        for (int t = s; t < kBlock; ++t)
          total = multiply_add(broadcast(keys_.scores[t][s]), load<T>(gradients_ + t * stride_ + j), total);
        store<T>(dv[s] + j, total);
      }
    }
    dv_.wrote(tokens);
  }

  // With b[t][s] = q_t . v_s and D(s,t) = prod_{s<m<t} e_m:
  //   dr_t = prod_{m<t} e_m d_t + sum_{s<t} b[t][s] D(s,t) k_s + b[t][t] u k_t
  //   dk_s = prod_{m>s} e_m g_s + sum_{t>s} b[t][s] D(s,t) r_t + b[s][s] u r_s
  //   e_m sum_j S_{m-1} G_m = W x + sum_{t>m} r_t prod_{m<t} e_m d_t + sum_{s<m} k_s prod_{m>s} e_m g_s
  //                           + sum_{s<m<t} b[t][s] D(s,t) r_t k_s
  void finish_block(int64_t chunk, int64_t block, const BlockRows<T>& rows) {
    const BlockTokens tokens = tokens_in(chunk, block);
    T b[kBlock][kBlock];
    dr_.template fetch<true>(tokens);
    for (int t = 0; t < kBlock; ++t)
      for (int s = 0; s <= t; ++s) b[t][s] = dot(rows.dy[t], rows.v[s], stride_);
    dk_.template fetch<true>(tokens);
    T *dr[kBlock], *dk[kBlock], *dw[kBlock];
    dr_.write(tokens, dr);
    dk_.write(tokens, dk);
    dw_.write(p_.dw.data ? tokens : BlockTokens{0, 0, 0}, dw);  // Eagle: thrown away, summed in dw_part_
    for (int64_t i = 0; i < stride_; i += kLanes<T>) finish_panel(i, tokens.count, rows, b, dr, dk, dw);
    dw_.template fetch<true>(tokens);
    if (token_of(chunk, block) % kSumTokens == 0) flush_sums();
    dr_.wrote(tokens);
    dk_.wrote(tokens);
    if (p_.dw.data) dw_.wrote(tokens);
  }

  void finish_panel(int64_t i, int64_t tokens, const BlockRows<T>& rows, const T (&b)[kBlock][kBlock],
                    T* const (&dr)[kBlock], T* const (&dk)[kBlock], T* const (&dw)[kBlock]) {
    Lanes<T> r[kBlock], k[kBlock], decay[kBlock];
    load_panel(r, rows.r, i);
    load_panel(k, rows.k, i);
    load_panel(decay, rows.decay, i);
    Lanes<T> from_state[kBlock], from_adjoint[kBlock];  // prod_{m<t} e_m d_t and prod_{m>s} e_m g_s
    Lanes<T> before = broadcast(T(1)), after = broadcast(T(1));
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) {
      const int s = kBlock - 1 - t;
      from_state[t] = before * load<T>(sums_ + t * stride_ + i);
      from_adjoint[s] = after * load<T>(sums_ + (kBlock + s) * stride_ + i);
      before = before * decay[t];
      after = after * decay[s];
    }
    const Lanes<T> u = load<T>(u_ + i);
    Lanes<T> du = load<T>(du_part_ + i), dw_sum = load<T>(dw_part_ + i);
    Lanes<T> d[kBlock], g[kBlock], between[kBlock];
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) {
      const Lanes<T> own = broadcast(b[t][t]);
      d[t] = multiply_add(own, u * k[t], from_state[t]);
      g[t] = multiply_add(own, u * r[t], from_adjoint[t]);
      du = multiply_add(own * r[t], k[t], du);
      between[t] = Lanes<T>{};
      Lanes<T> later = r[t], reach = broadcast(T(1));  // D(s,t) r_t and D(s,t), s falling
#pragma GCC unroll 8
      for (int s = t - 1; s >= 0; --s) {
        const Lanes<T> score = broadcast(b[t][s]);
        d[t] = multiply_add(score, reach * k[s], d[t]);
        g[s] = multiply_add(score, later, g[s]);
#pragma GCC unroll 8
        for (int m = s + 1; m < t; ++m) between[m] = multiply_add(score, later * k[s], between[m]);
        later = later * decay[s];
        reach = reach * decay[s];
      }
    }
    const Lanes<T> x = load<T>(sums_ + 2 * kBlock * stride_ + i);
#pragma GCC unroll 8
    for (int m = 0; m < kBlock; ++m) {
      Lanes<T> total = multiply_add(before, x, between[m]);
#pragma GCC unroll 8
      for (int t = m + 1; t < kBlock; ++t) total = multiply_add(r[t], from_state[t], total);
#pragma GCC unroll 8
      for (int s = 0; s < m; ++s) total = multiply_add(k[s], from_adjoint[s], total);
      const auto erased = decay[m] == T(0);  // where the rate may be infinite
      const Lanes<T> rate = erased ? Lanes<T>{} : -load<T>(rows.rate[m] + i);
      total = erased ? Lanes<T>{} : total;
      store<T>(dr[m] + i, d[m]);
      store<T>(dk[m] + i, g[m]);
      store<T>(dw[m] + i, rate * total);
      if (m < tokens) dw_sum = multiply_add(rate, total, dw_sum);  // 0 times what may be infinite is not 0
    }
    store<T>(du_part_ + i, du);
    store<T>(dw_part_ + i, dw_sum);
  }

  // fp32 sums stay inside kSumTokens; the sequence's own sums are fp64.
  void flush_sums() {
    const int64_t at = (at_.index * p_.shape.heads + head_) * size_;
    flush(du_part_, p_.du_partial + at);
    if (p_.dw_partial) flush(dw_part_, p_.dw_partial + at);
  }

  void flush(T* part, double* total) {
    for (int64_t i = 0; i < size_; ++i) total[i] += double(part[i]);
    std::memset(part, 0, size_t(stride_) * sizeof(T));
  }

  const WkvBackwardParams& p_;
  const Sequence& at_;
  const int64_t head_;
  const Columns columns_;
  const int64_t size_, stride_, width_;  // keys, padded; own columns, padded
  const int64_t blocks_;                 // of a chunk, no more than the sequence fills
  const bool whole_;                     // all columns are here
  Scratch<T> scratch_;
  TokenRows<T, kSize> r_, k_, v_, w_, dy_, dr_, dk_, dv_, dw_;
  BlockKeys<T> keys_;
  T *adjoint_, *states_;  // G, and the state before each block of the chunk: [stride / lanes][width][lanes]
  T *decays_, *rates_;    // of the chunk's tokens
  T *values_, *gradients_;  // own columns of v and dy of a block: [kBlock][stride]
  T *sums_, *u_, *zeros_, *du_part_, *dw_part_;
};
