// One token of every row through a whole Eagle or Finch model (arXiv 2404.05892, section 4), as stages of a crew's
// work. Everything between the weights and the state is fp32. Included after decode_vector.h, inside
// namespace rwkv::RWKV_ISA.

constexpr int64_t kSlices = 8;         // of the rows of a low-rank factor [D, R]: each gives one partial sum
constexpr int64_t kColumnBlock = 256;  // columns of a low-rank factor [R, D] that are one piece of work
constexpr float kHeadNormEpsilon = 64e-5f;

// fp32 rows that one stage leaves for the next, all [B][...].
struct Buffers {
  float *x, *h, *difference;             // [D] residual stream, layer norm, previous - current
  float* mixed[kMixes];                  // [D] inputs of the projections; the channel mix uses those of K and R
  float *partial_mix, *partial_decay;    // [kSlices][5 R], [kSlices][Rd]
  float *r, *k, *v, *g, *y;              // [A]
  float *ffn, *gate;                     // [F], [D]
  int64_t count = 0;                     // floats in all

  Buffers(const DecodeParams& p, float* base) {
    const int64_t attention = p.heads * p.head_size;
    const auto take = [&](int64_t size) {
      float* piece = base + count;
      count += padded(p.batch * size, 16);
      return piece;
    };
    x = take(p.width), h = take(p.width), difference = take(p.width);
    for (float*& row : mixed) row = take(p.width);
    partial_mix = take(kSlices * p.layer->mix_down.columns);
    partial_decay = take(kSlices * p.layer->decay_down.columns);
    r = take(attention), k = take(attention), v = take(attention), g = take(attention), y = take(attention);
    ffn = take(p.ffn_width), gate = take(p.width);
  }
};

inline int64_t scratch_floats(const DecodeParams& p) { return Buffers(p, nullptr).count; }

inline int64_t low_floats(const DecodeParams& p) {
  return padded(std::max(p.layer->mix_up.rows / kMixes, p.layer->decay_up.rows), 16);
}

inline int64_t member_floats(const DecodeParams& p) { return low_floats(p) + padded(p.head_size, 16); }

// What becomes of a product's rows.
enum class Finish { kStore, kSquaredRelu, kSigmoid, kAdd, kAddGated, kLogits };

struct Product {
  const Matrix& matrix;
  const float* in;
  float* out;
  Finish finish;
};

class Token {
 public:
  Token(const DecodeParams& params, const WkvKernels& wkv, float* scratch, float* own, CrewMember crew)
      : p_(params), wkv_(wkv), attention_(p_.heads * p_.head_size), buffers_(params, scratch), crew_(crew), low_(own),
        omega_(own + low_floats(params)) {}

  void run() {
    crew_.work(p_.batch, [&](int64_t b) {
      float* x = buffers_.x + b * p_.width;
      const Vector row{at(p_.x, p_.storage, b * p_.width), p_.storage};
      for_lanes(p_.width, [&](int64_t i) { store<float>(x + i, lanes_at(row, i)); });
      layer_norm(x, p_.width, p_.ln0_weight, p_.ln0_bias, x);
    });
    for (int64_t index = 0; index < p_.layers; ++index) {
      time_mix(p_.layer[index], index);
      channel_mix(p_.layer[index], index);
    }
    crew_.work(p_.batch, [&](int64_t b) {
      layer_norm(buffers_.x + b * p_.width, p_.width, p_.ln_out_weight, p_.ln_out_bias, buffers_.h + b * p_.width);
    });
    multiply(Product{p_.head, buffers_.h, nullptr, Finish::kLogits});
  }

 private:
  void time_mix(const DecodeLayer& layer, int64_t index) {
    crew_.work(p_.batch, [&](int64_t b) { shift_for_time_mix(layer, index, b); });
    if (p_.finch) {
      crew_.work(kSlices, [&](int64_t slice) {
        add_slice(layer.mix_down, slice, buffers_.mixed[0], buffers_.partial_mix);
      });
      const int64_t blocks = (p_.width + kColumnBlock - 1) / kColumnBlock;
      crew_.work(kMixes * blocks, [&](int64_t item) { mix_columns(layer, item / blocks, item % blocks); });
    }
    const Product products[] = {{layer.receptance, buffers_.mixed[kMixR], buffers_.r, Finish::kStore},
                                {layer.key, buffers_.mixed[kMixK], buffers_.k, Finish::kStore},
                                {layer.value, buffers_.mixed[kMixV], buffers_.v, Finish::kStore},
                                {layer.gate, buffers_.mixed[kMixG], buffers_.g, Finish::kStore}};
    multiply_all(products, p_.finch ? kSlices : 0, [&](int64_t slice) {
      add_slice(layer.decay_down, slice, buffers_.mixed[kMixW], buffers_.partial_decay);
    });
    crew_.work(p_.batch * p_.heads, [&](int64_t item) { head(layer, index, item / p_.heads, item % p_.heads); });
    multiply(Product{layer.output, buffers_.y, buffers_.x, Finish::kAdd});
  }

  void channel_mix(const DecodeLayer& layer, int64_t index) {
    crew_.work(p_.batch, [&](int64_t b) { shift_for_channel_mix(layer, index, b); });
    const Product products[] = {{layer.ffn_key, buffers_.mixed[kMixK], buffers_.ffn, Finish::kSquaredRelu},
                                {layer.ffn_receptance, buffers_.mixed[kMixR], buffers_.gate, Finish::kSigmoid}};
    multiply_all(products, 0, [](int64_t) {});
    multiply(Product{layer.ffn_value, buffers_.ffn, buffers_.x, Finish::kAddGated});
  }

  // h = norm(x), the difference to the previous token's h, which h then replaces in the state.
  void shift(const Vector& weight, const Vector& bias, const StatePart& state, int64_t index, int64_t b) {
    float *h = buffers_.h + b * p_.width, *difference = buffers_.difference + b * p_.width;
    layer_norm(buffers_.x + b * p_.width, p_.width, weight, bias, h);
    void* last = state_row(state, index, b);
    for_lanes(p_.width, [&](int64_t i) {
      const Floats previous = last ? lanes_at(Vector{last, state.storage}, i) : Floats{};
      store<float>(difference + i, previous - load<float>(h + i));
    });
    if (last) store_row(h, last, state.storage, 0, p_.width);
  }

  // out = h + difference * (Finch's weight of the previous token, which is 1 - Eagle's of the current one).
  void mix_row(const Vector& weight, int64_t b, float* out) {
    const float *h = buffers_.h + b * p_.width, *difference = buffers_.difference + b * p_.width;
    for_lanes(p_.width, [&](int64_t i) {
      const Floats share = p_.finch ? lanes_at(weight, i) : 1.0f - lanes_at(weight, i);
      store<float>(out + b * p_.width + i, load<float>(h + i) + load<float>(difference + i) * share);
    });
  }

  void shift_for_time_mix(const DecodeLayer& layer, int64_t index, int64_t b) {
    shift(layer.ln1_weight, layer.ln1_bias, p_.att_shift, index, b);
    if (p_.finch) return mix_row(layer.mix_x, b, buffers_.mixed[0]);
    for (int mix = kMixK; mix < kMixes; ++mix) mix_row(layer.mix[mix], b, buffers_.mixed[mix]);
  }

  void shift_for_channel_mix(const DecodeLayer& layer, int64_t index, int64_t b) {
    shift(layer.ln2_weight, layer.ln2_bias, p_.ffn_shift, index, b);
    mix_row(layer.ffn_mix_k, b, buffers_.mixed[kMixK]);
    mix_row(layer.ffn_mix_r, b, buffers_.mixed[kMixR]);
  }

  // One slice's share of in [B][D] times factor [D, R], into partial [B][kSlices][R].
  void add_slice(const Matrix& factor, int64_t slice, const float* in, float* partial) {
    const int64_t rows = (factor.rows + kSlices - 1) / kSlices, first = std::min(slice * rows, factor.rows);
    const int64_t count = std::min(rows, factor.rows - first);
    for (int64_t b = 0; b < p_.batch; ++b) {
      float* out = partial + (b * kSlices + slice) * factor.columns;
      std::memset(out, 0, size_t(factor.columns) * sizeof(float));
      add_rows(factor, first, count, 0, factor.columns, in + b * factor.rows + first, out);
    }
  }

  // low_ = tanh of the sum of the slices, in their order, of columns first to first + count - 1.
  void sum_slices(const float* partial, int64_t b, int64_t columns, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) low_[i] = 0;
    for (int64_t slice = 0; slice < kSlices; ++slice) {
      const float* row = partial + (b * kSlices + slice) * columns + first;
      for (int64_t i = 0; i < count; ++i) low_[i] += row[i];
    }
    for_lanes(count, [&](int64_t i) { store<float>(low_ + i, tanh_of(load<float>(low_ + i))); });
  }

  // A block of columns of one of Finch's five mixed inputs.
  void mix_columns(const DecodeLayer& layer, int64_t mix, int64_t block) {
    const int64_t rank = layer.mix_up.rows / kMixes, first = block * kColumnBlock;
    const int64_t count = std::min(kColumnBlock, p_.width - first);
    for (int64_t b = 0; b < p_.batch; ++b) {
      float share[kColumnBlock];
      for_lanes(count, [&](int64_t i) { store<float>(share + i, lanes_at(layer.mix[mix], first + i)); });
      sum_slices(buffers_.partial_mix, b, layer.mix_down.columns, mix * rank, rank);
      add_rows(layer.mix_up, mix * rank, rank, first, count, low_, share);
      const int64_t at = b * p_.width + first;
      for_lanes(count, [&](int64_t i) {
        const Floats h = load<float>(buffers_.h + at + i), difference = load<float>(buffers_.difference + at + i);
        store<float>(buffers_.mixed[mix] + at + i, h + difference * load<float>(share + i));
      });
    }
  }

  // The recurrence, the head norm and the gate of one head.
  void head(const DecodeLayer& layer, int64_t index, int64_t b, int64_t head) {
    const int64_t size = p_.head_size, first = head * size, at = b * attention_ + first;
    float *y = buffers_.y + at, *g = buffers_.g + at;
    void* state = state_row(p_.wkv, index, b);
    if (!state) {
      std::memset(y, 0, size_t(size) * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < size; ++i) omega_[i] = number_at(layer.decay, first + i);
    if (p_.finch) {
      sum_slices(buffers_.partial_decay, b, layer.decay_down.columns, 0, layer.decay_down.columns);
      add_rows(layer.decay_up, 0, layer.decay_up.rows, first, size, low_, omega_);
    }
    WkvStepParams step;
    step.shape.batch = step.shape.tokens = step.shape.heads = step.shape.sequences = 1;
    step.shape.head_size = size;
    step.r.data = buffers_.r + at, step.k.data = buffers_.k + at, step.v.data = buffers_.v + at;
    step.w.data = omega_, step.y.data = y;
    step.u = View{at_of(layer.bonus, first), dtype_of(layer.bonus.storage)};
    step.state = static_cast<float*>(state) + first * size;
    wkv_.step(step, 0, 0);
    normalise(y, size, kHeadNormEpsilon, y);
    for (int64_t i = 0; i < size; ++i)
      y[i] = y[i] * number_at(layer.head_norm_weight, first + i) + number_at(layer.head_norm_bias, first + i);
    gate_row(g, y, size);
  }

  // y *= silu(g)
  static void gate_row(const float* g, float* y, int64_t size) {
    constexpr int64_t kStep = kLanes<float>;
    for (int64_t i = 0; i < size; i += kStep) {
      float part[kStep] = {};
      const int64_t count = std::min(kStep, size - i);
      std::memcpy(part, g + i, size_t(count) * sizeof(float));
      const Floats gate = load<float>(part) * sigmoid_of(load<float>(part));
      for (int64_t j = 0; j < count; ++j) y[i + j] *= gate[j];
    }
  }

  void multiply(const Product& product) {
    crew_.work(items_of(product.matrix), [&](int64_t item) { multiply_item(product, item); });
  }

  // Several products and `others` other items in one stage.
  template <size_t kCount, class Other>
  void multiply_all(const Product (&products)[kCount], int64_t others, const Other& other) {
    int64_t items = others;
    for (const Product& product : products) items += items_of(product.matrix);
    crew_.work(items, [&](int64_t item) {
      if (item < others) return other(item);
      item -= others;
      const Product* product = products;
      for (; item >= items_of(product->matrix); ++product) item -= items_of(product->matrix);
      multiply_item(*product, item);
    });
  }

  void multiply_item(const Product& product, int64_t item) {
    const Matrix& matrix = product.matrix;
    const int64_t first = item * item_rows(matrix), rows = std::min(item_rows(matrix), matrix.rows - first);
    float out[kBatchBlock][kMaxItemRows];
    for (int64_t b = 0; b < p_.batch; b += kBatchBlock) {
      const int64_t batch = std::min(kBatchBlock, p_.batch - b);
      dot_item(matrix, first, rows, product.in + b * matrix.columns, batch, out);
      for (int64_t i = 0; i < batch; ++i) {
        const bool skipped = p_.slots && p_.slots[b + i] < 0;
        if (skipped) std::memset(out[i], 0, sizeof out[i]);
        finish(product, out[i], (b + i) * matrix.rows + first, rows);
      }
    }
  }

  void finish(const Product& product, float* rows, int64_t at, int64_t count) {
    float *out = product.out + at, *gate = buffers_.gate + at;
    switch (product.finish) {
      case Finish::kStore:
        std::memcpy(out, rows, size_t(count) * sizeof(float));
        break;
      case Finish::kSquaredRelu:
        for (int64_t i = 0; i < count; ++i) out[i] = rows[i] < 0 ? 0 : rows[i] * rows[i];  // NaN stays
        break;
      case Finish::kSigmoid:
        for_lanes(count, [&](int64_t i) { store<float>(rows + i, sigmoid_of(load<float>(rows + i))); });
        std::memcpy(out, rows, size_t(count) * sizeof(float));
        break;
      case Finish::kAdd:
        for (int64_t i = 0; i < count; ++i) out[i] += rows[i];
        break;
      case Finish::kAddGated:
        for (int64_t i = 0; i < count; ++i) out[i] += gate[i] * rows[i];
        break;
      case Finish::kLogits:
        store_row(rows, p_.logits, p_.storage, at, count);
        break;
    }
  }

  // nullptr for a row without a state.
  void* state_row(const StatePart& part, int64_t index, int64_t b) const {
    const int64_t row = p_.slots ? p_.slots[b] : b;
    if (row < 0) return nullptr;
    return at(part.data, part.storage, index * part.layer_stride + row * part.row_stride);
  }

  static void* at(const void* data, Storage storage, int64_t offset) {
    static constexpr int64_t kBytes[] = {4, 2, 2, 1};
    return const_cast<char*>(static_cast<const char*>(data)) + offset * kBytes[int(storage)];
  }

  static void* at_of(const Vector& row, int64_t offset) { return at(row.data, row.storage, offset); }

  const DecodeParams& p_;
  const WkvKernels& wkv_;
  const int64_t attention_;
  const Buffers buffers_;
  CrewMember crew_;
  float *const low_, *const omega_;  // this member's own, for one item
};

// The same count on every path through Token::run.
inline int64_t stages_of(const DecodeParams& p) { return 3 + p.layers * (p.finch ? 9 : 7); }

inline void run_token(const DecodeParams& params, const WkvKernels& wkv, float* scratch, float* own, CrewMember crew) {
  Token(params, wkv, scratch, own, crew).run();
}
