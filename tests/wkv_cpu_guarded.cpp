// The CPU WKV kernels without torch, built with AddressSanitizer: every row of every tensor has forbidden memory behind it,
// outputs and scratch memory start as NaN, each call has a thread and so scratch memory of its own, and all results are
// compared with the recurrence in double, one token at a time. Runs every instruction set that this processor has.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "cpu/denormals.h"
#include "cpu/instruction_set.h"
#include "cpu/wkv_kernels.h"
#include "guarded_rows.h"

// What Scratch takes its memory with.
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  void* memory = std::aligned_alloc(std::size_t(alignment), bytes);
  if (!memory) throw std::bad_alloc();
  return std::memset(memory, 0xff, bytes);
}
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }

namespace rwkv {
namespace {

struct Case {
  Dtype activation, parameter;
  bool eagle;
  bool packed;  // lengths of the sequences of one row, else one row each, all of the first length
  std::vector<int64_t> lengths;
  int64_t heads, size;
  bool has_dy = true, has_state = true;
};

// Small multiples of 1/16, exact in every dtype.
class Random {
 public:
  double operator()(double least, double most) {
    bits_ = bits_ * 6364136223846793005u + 1442695040888963407u;
    return std::round((least + (most - least) * double(bits_ >> 40) / double(1 << 24)) * 16) / 16;
  }

 private:
  uint64_t bits_ = 7;
};

// Error and size of one result, summed.
class Judge {
 public:
  Judge(const Case& c, const char* set) : c_(c), set_(set) {}
  void add(double actual, double expected) {
    const double error = actual - expected;
    error_ += error * error, size_ += expected * expected;
  }
  void done(const char* name, bool stored) {
    const double limits[] = {4e-6, 1e-13, 4e-3, 6e-4};
    const bool wide = c_.activation == Dtype::kFloat64;
    const double limit = stored ? limits[int(c_.activation)] : wide ? 1e-13 : 4e-6;
    if (!(std::sqrt(error_) <= limit * std::sqrt(size_) + 1e-6 * limit)) {
      std::fprintf(stderr, "%s %s: error %g of %g; dtypes %d %d, eagle %d, packed %d, T %ld, H %ld, N %ld\n",
                   set_, name, std::sqrt(error_), std::sqrt(size_), int(c_.activation), int(c_.parameter), c_.eagle,
                   c_.packed, long(c_.lengths[0]), long(c_.heads), long(c_.size));
      std::exit(1);
    }
    error_ = size_ = 0;
  }

 private:
  const Case& c_;
  const char* set_;
  double error_ = 0, size_ = 0;
};

void require(bool holds, const char* set, const char* what, const Case& c) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s; dtypes %d %d, N %ld\n", set, what, int(c.activation), int(c.parameter), long(c.size));
  std::exit(1);
}

template <class Body>
void in_own_thread(const Body& body) {
  std::thread([&] {
    const FlushDenormals flush;
    body();
  }).join();
}

std::vector<Sequence> sequences_of(const Case& c) {
  std::vector<Sequence> sequences;
  int64_t token = 0, chunk = 0;
  for (int64_t tokens : c.lengths) {
    const int64_t index = int64_t(sequences.size());
    sequences.push_back({index, c.packed ? 0 : index, c.packed ? token : 0, tokens, chunk});
    token += tokens, chunk += chunks_of(tokens);
  }
  return sequences;
}

WkvShape shape_of(const Case& c, const std::vector<Sequence>& sequences) {
  const Sequence& last = sequences.back();
  WkvShape shape;
  shape.sequences = int64_t(sequences.size()), shape.batch = c.packed ? 1 : shape.sequences;
  shape.tokens = last.first_token + last.tokens, shape.chunks = last.first_chunk + chunks_of(last.tokens);
  shape.heads = c.heads, shape.head_size = c.size;
  shape.constant_decay = c.eagle, shape.fp64 = c.activation == Dtype::kFloat64;
  return shape;
}

// The inputs of one case; run() calls the kernels and check() compares.
class Trial {
 public:
  Trial(const WkvKernels& kernels, const Case& c) : kernels_(kernels), c_(c) {}

  void run() {
    const int64_t units = (c_.size + kColumnUnit - 1) / kColumnUnit;
    fill();
    Numbers state_out(shape_.fp64, squares()), chunk_states(shape_.fp64, shape_.chunks * c_.heads * c_.size * c_.size);
    Numbers dstate(shape_.fp64, squares());
    for (int64_t parts = 1; parts <= units; ++parts) {
      GuardedRows y = rows(), dr = rows(), dk = rows(), dv = rows(), dw = decays();
      Numbers state(shape_.fp64, squares()), saved(shape_.fp64, shape_.chunks * c_.heads * c_.size * c_.size);
      Numbers partial(shape_.fp64, parts > 1 ? kernels_.partial_sums(shape_) : 0), dstate_now(shape_.fp64, squares());
      std::vector<double> du(vectors(), 0.0), dw_sum(vectors(), 0.0);
      WkvForwardParams forward;
      forward.shape = shape_, forward.r = r_.view, forward.k = k_.view, forward.v = v_.view, forward.w = w_.view;
      forward.u = u_.view, forward.y = y.view, forward.state = c_.has_state ? state_.data : nullptr;
      forward.state_out = state.data, forward.chunk_states = saved.data;
      WkvBackwardParams backward;
      backward.shape = shape_, backward.r = r_.view, backward.k = k_.view, backward.v = v_.view;
      backward.w = w_.view, backward.u = u_.view;
      if (c_.has_dy) backward.dy = dy_.view;
      backward.dr = dr.view, backward.dk = dk.view, backward.dv = dv.view;
      if (!c_.eagle) backward.dw = dw.view;
      backward.dstate_out = c_.has_state ? dstate_out_.data : nullptr, backward.chunk_states = saved.data;
      backward.dstate = dstate_now.data, backward.du_partial = du.data();
      backward.dw_partial = c_.eagle ? dw_sum.data() : nullptr;
      backward.partial_sums = parts > 1 ? partial.data : nullptr;
      each(parts, [&](const auto&... task) { kernels_.forward(forward, task...); });
      each(parts, [&](const auto&... task) { kernels_.backward(backward, task...); });
      if (parts > 1)
        each(1, [&](const Sequence& s, int64_t head, Columns) { kernels_.finish_backward(backward, s, head); });
      check(y, state, dr, dk, dv, dw, du, dw_sum, dstate_now);
      if (parts == 1) {
        std::memcpy(state_out.data, state.data, size_t(squares() * (shape_.fp64 ? 8 : 4)));
        std::memcpy(dstate.data, dstate_now.data, size_t(squares() * (shape_.fp64 ? 8 : 4)));
      }
      require(state_out.same(state) && dstate.same(dstate_now), name(), "divided columns change bits", c_);
    }
    run_summaries(units);
    run_step();
  }

 private:
  const char* name() const { return kernels_.instruction_set; }
  int64_t vectors() const { return shape_.sequences * c_.heads * c_.size; }
  int64_t squares() const { return vectors() * c_.size; }
  GuardedRows rows() const { return {c_.activation, shape_.batch, shape_.tokens, c_.heads, c_.size}; }
  GuardedRows decays() const {
    return {c_.parameter, c_.eagle ? 0 : shape_.batch, shape_.tokens, c_.heads, c_.size};
  }

  template <class Body>
  void each(int64_t parts, const Body& body) const {
    const int64_t units = (c_.size + kColumnUnit - 1) / kColumnUnit;
    const auto border = [&](int64_t part) { return std::min(c_.size, part * units / parts * kColumnUnit); };
    for (const Sequence& sequence : sequences_)
      for (int64_t head = 0; head < c_.heads; ++head)
        for (int64_t part = 0; part < parts; ++part)
          in_own_thread([&] { body(sequence, head, Columns{border(part), border(part + 1) - border(part)}); });
  }

  void fill() {
    Random random;
    for (int64_t row = 0; row < shape_.batch; ++row)
      for (int64_t token = 0; token < shape_.tokens; ++token)
        for (int64_t head = 0; head < c_.heads; ++head)
          for (int64_t i = 0; i < c_.size; ++i) {
            for (GuardedRows* x : {&r_, &k_, &v_, &dy_}) x->set(row, token, head, i, random(-2, 2));
            if (!c_.eagle) w_.set(row, token, head, i, random(-5, 1));
          }
    for (int64_t head = 0; head < c_.heads; ++head)
      for (int64_t i = 0; i < c_.size; ++i) {
        u_.set(0, 0, head, i, random(-1, 1));
        if (c_.eagle) w_.set(0, 0, head, i, random(-5, 1));
      }
    for (int64_t at = 0; at < squares(); ++at) state_.set(at, random(-1, 1)), dstate_out_.set(at, random(-1, 1));
  }

  double decay(const Sequence& s, int64_t t, int64_t head, int64_t i) const {
    return std::exp(-std::exp(w_.get(s.row, s.first_token + t, head, i)));
  }

  void check(const GuardedRows& y, const Numbers& state, const GuardedRows& dr, const GuardedRows& dk,
             const GuardedRows& dv, const GuardedRows& dw, const std::vector<double>& du,
             const std::vector<double>& dw_sum, const Numbers& dstate) const {
    const int64_t size = c_.size;
    Judge ys(c_, name()), states(c_, name()), drs(c_, name()), dks(c_, name()), dvs(c_, name()), dws(c_, name());
    Judge dus(c_, name()), dw_sums(c_, name()), dstates(c_, name());
    for (const Sequence& s : sequences_)
      for (int64_t head = 0; head < c_.heads; ++head) {
        const int64_t pair = s.index * c_.heads + head;
        const auto at = [&](const GuardedRows& x, int64_t t, int64_t i) {
          return x.get(s.row, s.first_token + t, head, i);
        };
        const auto q = [&](int64_t t, int64_t j) { return c_.has_dy ? at(dy_, t, j) : 0.0; };
        std::vector<std::vector<double>> before(size_t(s.tokens + 1), std::vector<double>(size_t(size * size)));
        for (int64_t n = 0; n < size * size; ++n) before[0][n] = c_.has_state ? state_.get(pair * size * size + n) : 0;
        for (int64_t t = 0; t < s.tokens; ++t) {
          std::vector<double> out(size, 0.0);
          for (int64_t i = 0; i < size; ++i) {
            const double r = at(r_, t, i), k = at(k_, t, i), e = decay(s, t, head, i), u = u_.get(0, 0, head, i);
            for (int64_t j = 0; j < size; ++j) {
              const double old = before[t][i * size + j], kv = k * at(v_, t, j);
              out[j] += r * (old + u * kv);
              before[t + 1][i * size + j] = e * old + kv;
            }
          }
          for (int64_t j = 0; j < size; ++j) ys.add(at(y, t, j), out[j]);
        }
        for (int64_t n = 0; n < size * size; ++n) states.add(state.get(pair * size * size + n), before[s.tokens][n]);

        std::vector<double> g(size * size), du_sum(size, 0.0), decay_sum(size, 0.0);
        for (int64_t n = 0; n < size * size; ++n) g[n] = c_.has_state ? dstate_out_.get(pair * size * size + n) : 0;
        for (int64_t t = s.tokens - 1; t >= 0; --t) {
          double vq = 0, bonus = 0;
          std::vector<double> dv_t(size, 0.0);
          for (int64_t i = 0; i < size; ++i) {
            vq += at(v_, t, i) * q(t, i);
            bonus += at(r_, t, i) * at(k_, t, i) * u_.get(0, 0, head, i);
          }
          for (int64_t i = 0; i < size; ++i) {
            const double r = at(r_, t, i), k = at(k_, t, i), e = decay(s, t, head, i), u = u_.get(0, 0, head, i);
            double dr_t = u * k * vq, dk_t = u * r * vq, sg = 0;
            for (int64_t j = 0; j < size; ++j) {
              double& adjoint = g[i * size + j];
              dr_t += q(t, j) * before[t][i * size + j];
              dk_t += at(v_, t, j) * adjoint;
              dv_t[j] += k * adjoint;
              sg += before[t][i * size + j] * adjoint;
              adjoint = e * adjoint + r * q(t, j);
            }
            const double dw_t = -std::exp(w_.get(s.row, s.first_token + t, head, i)) * e * sg;
            drs.add(at(dr, t, i), dr_t), dks.add(at(dk, t, i), dk_t);
            if (!c_.eagle) dws.add(at(dw, t, i), dw_t);
            du_sum[i] += r * k * vq, decay_sum[i] += dw_t;
          }
          for (int64_t j = 0; j < size; ++j) dvs.add(at(dv, t, j), dv_t[j] + q(t, j) * bonus);
        }
        for (int64_t n = 0; n < size * size; ++n) dstates.add(dstate.get(pair * size * size + n), g[n]);
        for (int64_t i = 0; i < size; ++i) {
          dus.add(du[pair * size + i], du_sum[i]);
          if (c_.eagle) dw_sums.add(dw_sum[pair * size + i], decay_sum[i]);
        }
      }
    ys.done("y", true), states.done("state_out", false), drs.done("dr", true), dks.done("dk", true);
    dvs.done("dv", true), dws.done("dw", true), dus.done("du", false), dw_sums.done("dw", false);
    dstates.done("dstate", false);
  }

  // The state after the tokens (of the adjoint: before them) from zeros, and the product of decays.
  void run_summaries(int64_t parts) {
    for (const bool adjoint : {false, true}) {
      const GuardedRows &key = adjoint ? r_ : k_, &value = adjoint ? dy_ : v_;
      Numbers state(shape_.fp64, squares()), product(shape_.fp64, vectors());
      WkvSummaryParams p;
      p.shape = shape_, p.k = key.view, p.v = value.view, p.w = w_.view, p.adjoint = adjoint;
      p.decay = adjoint ? nullptr : product.data, p.state = state.data;
      each(parts, [&](const Sequence& s, int64_t head, Columns columns) { kernels_.summary(p, s, head, columns); });
      Judge states(c_, name()), products(c_, name());
      for (const Sequence& s : sequences_)
        for (int64_t head = 0; head < c_.heads; ++head)
          for (int64_t i = 0; i < c_.size; ++i) {
            const int64_t at = (s.index * c_.heads + head) * c_.size + i;
            std::vector<double> expected(c_.size, 0.0);
            double all = 1;
            for (int64_t n = 0; n < s.tokens; ++n) {
              const int64_t t = adjoint ? s.tokens - 1 - n : n, token = s.first_token + t;
              const double e = decay(s, t, head, i), k = key.get(s.row, token, head, i);
              all *= e;
              for (int64_t j = 0; j < c_.size; ++j)
                expected[j] = e * expected[j] + k * value.get(s.row, token, head, j);
            }
            for (int64_t j = 0; j < c_.size; ++j) states.add(state.get(at * c_.size + j), expected[j]);
            if (!adjoint) products.add(product.get(at), all);
          }
      states.done("summary state", false), products.done("summary decay", false);
    }
  }

  // The first token of every row; with two slots more than rows and the first row skipped.
  void run_step() {
    if (c_.packed || !shape_.tokens || c_.eagle) return;
    const int64_t square = c_.size * c_.size, slots = shape_.batch + 2;
    GuardedRows y(c_.activation, shape_.batch, 1, c_.heads, c_.size);
    Numbers state(shape_.fp64, slots * c_.heads * square);
    std::vector<int64_t> slot_of;
    for (int64_t row = 0; row < shape_.batch; ++row) slot_of.push_back(row == 0 ? -1 : slots - row);
    for (int64_t at = 0; at < slots * c_.heads * square; ++at) state.set(at, state_.get(at % squares()));
    WkvStepParams p;
    p.shape = shape_, p.shape.tokens = 1, p.shape.sequences = slots, p.r = r_.view, p.k = k_.view, p.v = v_.view;
    p.w = w_.view, p.u = u_.view, p.y = y.view, p.state = state.data, p.slots = slot_of.data();
    for (int64_t row = 0; row < shape_.batch; ++row)
      for (int64_t head = 0; head < c_.heads; ++head) in_own_thread([&] { kernels_.step(p, row, head); });
    Judge ys(c_, name()), states(c_, name());
    for (int64_t row = 0; row < shape_.batch; ++row)
      for (int64_t head = 0; head < c_.heads; ++head) {
        std::vector<double> out(c_.size, 0.0);
        const int64_t first = (slot_of[row] * c_.heads + head) * square;
        for (int64_t i = 0; slot_of[row] >= 0 && i < c_.size; ++i)
          for (int64_t j = 0; j < c_.size; ++j) {
            const int64_t at = first + i * c_.size + j;
            const double old = state_.get(at % squares()), kv = k_.get(row, 0, head, i) * v_.get(row, 0, head, j);
            out[j] += r_.get(row, 0, head, i) * (old + u_.get(0, 0, head, i) * kv);
            states.add(state.get(at), std::exp(-std::exp(w_.get(row, 0, head, i))) * old + kv);
          }
        for (int64_t j = 0; j < c_.size; ++j) ys.add(y.get(row, 0, head, j), out[j]);
      }
    ys.done("step y", true), states.done("step state", false);
  }

  const WkvKernels& kernels_;
  const Case& c_;
  const std::vector<Sequence> sequences_ = sequences_of(c_);
  const WkvShape shape_ = shape_of(c_, sequences_);
  GuardedRows r_ = rows(), k_ = rows(), v_ = rows(), dy_ = rows(), w_ = decays();
  GuardedRows u_{c_.parameter, 0, 0, c_.heads, c_.size};
  Numbers state_{shape_.fp64, squares()}, dstate_out_{shape_.fp64, squares()};
};

int run_all(const WkvKernels& kernels) {
  const Dtype f32 = Dtype::kFloat32, f64 = Dtype::kFloat64, bf16 = Dtype::kBFloat16, f16 = Dtype::kFloat16;
  const struct {
    Dtype activation, parameter;
  } dtypes[] = {{f32, f32}, {bf16, f32}, {f16, f16}, {f64, f64}, {bf16, bf16}, {f16, f32}};
  int cases = 0;
  const auto run = [&](const Case& c) {
    Trial(kernels, c).run();
    ++cases;
  };
  for (const auto& [activation, parameter] : dtypes) {
    for (const int64_t size : {1, 3, 7, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100})
      run({activation, parameter, size % 3 == 0, false, {6, 6}, 2, size});
    for (const int64_t tokens : {0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 127, 128, 129, 131})
      for (const bool eagle : {false, true}) run({activation, parameter, eagle, false, {tokens}, 1, 5 + tokens % 12});
    for (const bool eagle : {false, true}) run({activation, parameter, eagle, true, {0, 7, 1, 0, 130, 3, 0}, 2, 9});
    run({activation, parameter, false, false, {5}, 1, 8, false, true});
    run({activation, parameter, true, false, {5}, 1, 64, true, false});
  }
  for (const int64_t size : {127, 128, 130, 256}) run({f32, f32, false, false, {5}, 1, size});
  run({bf16, f32, true, false, {5}, 1, 128});
  return cases;
}

bool has(InstructionSet set) { return set <= instruction_set(); }

}  // namespace
}  // namespace rwkv

int main() {
  using namespace rwkv;
  std::printf("generic %d\n", run_all(kWkvGeneric));
#if defined(__x86_64__)
  if (has(InstructionSet::kAvx2)) std::printf("avx2 %d\n", run_all(kWkvAvx2));
  if (has(InstructionSet::kAvx512)) std::printf("avx512 %d\n", run_all(kWkvAvx512));
#endif
}
