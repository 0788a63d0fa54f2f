#include "warp_operations.h"

#include "block.h"
#include "number_formats.h"

namespace emulator {
namespace {

struct Exchange {
  uint32_t value;
  int source;
  uint32_t received;
};

void compute_exchange(void* (&operands)[32]) {
  for (void* operand : operands) {
    auto* lane = static_cast<Exchange*>(operand);
    lane->received = static_cast<Exchange*>(operands[lane->source & 31])->value;
  }
}

struct Distribution {
  const MatrixRow* row;
  uint32_t* d;
};

uint32_t element(const MatrixRow& row, int column) { return row.words[column / 2] >> (16 * (column % 2)) & 0xffffu; }

template <bool kTransposed>
void compute_distribution(void* (&operands)[32]) {
  const auto row = [&](int matrix, int index) -> const MatrixRow& {
    return *static_cast<Distribution*>(operands[8 * matrix + index])->row;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, member = lane % 4;
    uint32_t* d = static_cast<Distribution*>(operands[lane])->d;
    for (int m = 0; m < 4; ++m)
      d[m] = kTransposed ? element(row(m, 2 * member), group) | element(row(m, 2 * member + 1), group) << 16
                         : row(m, group).words[member];
  }
}

struct Collection {
  const uint32_t* d;
  MatrixRow row;
};

void compute_collection(void* (&operands)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    const int matrix = lane / 8, index = lane % 8;
    uint32_t* words = static_cast<Collection*>(operands[lane])->row.words;
    for (int column = 0; column < 8; ++column) {
      const uint32_t pair = static_cast<Collection*>(operands[4 * column + index / 2])->d[matrix];
      const uint32_t value = pair >> (16 * (index % 2)) & 0xffffu;
      words[column / 2] = column % 2 ? words[column / 2] | value << 16 : value;
    }
  }
}

struct Fragments {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
  bool from_zero;
};

struct BFloat16Pairs {
  static constexpr int kDepth = 16;
  static float value(uint32_t bits, int k) { return float_of_bfloat16(static_cast<uint16_t>(bits >> (16 * (k % 2)))); }
};
struct Float16Pairs {
  static constexpr int kDepth = 16;
  static float value(uint32_t bits, int k) { return float_of_float16(static_cast<uint16_t>(bits >> (16 * (k % 2)))); }
};
struct Tf32 {
  static constexpr int kDepth = 8;
  static float value(uint32_t bits, int) { return tf32_operand(std::bit_cast<float>(bits)); }
};

template <class Format>
void compute_product(void* (&operands)[32]) {
  constexpr int kDepth = Format::kDepth, kRows = 16, kColumns = 8, kPerLane = kDepth / 8;
  const auto lane = [&](int group, int member) { return static_cast<Fragments*>(operands[4 * group + member]); };
  float a[kRows][kDepth], b[kDepth][kColumns], c[kRows][kColumns];
  for (int k = 0; k < kDepth; ++k) {
    const int member = k % 8 % (4 * kPerLane) / kPerLane, half = k / (4 * kPerLane);
    for (int i = 0; i < kRows; ++i) a[i][k] = Format::value(lane(i % 8, member)->a[i / 8 + 2 * half], k);
    for (int j = 0; j < kColumns; ++j) b[k][j] = Format::value(lane(j, member)->b[half], k);
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) {
      const Fragments* owner = lane(i % 8, j / 2);
      c[i][j] = owner->from_zero ? 0.f : owner->c[2 * (i / 8) + j % 2];
    }
  for (int i = 0; i < kRows; ++i)
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < kColumns; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) lane(i % 8, j / 2)->c[2 * (i / 8) + j % 2] = c[i][j];
}

}  // namespace

uint32_t exchange_lane(uint32_t value, int source_lane, const char* name, const Location& where) {
  Exchange exchange{value, source_lane, 0};
  warp_exchange(name, &exchange, compute_exchange, where);
  return exchange.received;
}

void distribute_matrices(uint32_t (&d)[4], const MatrixRow& row, bool transposed, const Location& where) {
  Distribution distribution{&row, d};
  if (transposed)
    warp_exchange("load_matrices_transposed", &distribution, compute_distribution<true>, where);
  else
    warp_exchange("load_matrices", &distribution, compute_distribution<false>, where);
}

MatrixRow collect_matrix_row(const uint32_t (&d)[4], const Location& where) {
  Collection collection{d, {}};
  warp_exchange("store_matrices_transposed", &collection, compute_collection, where);
  return collection.row;
}

void multiply_fragments(Product product, bool from_zero, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                        uint32_t b1, const Location& where) {
  Fragments fragments{c, a, {b0, b1}, from_zero};
  switch (product) {
    case Product::kBFloat16: warp_exchange("mma16", &fragments, compute_product<BFloat16Pairs>, where); break;
    case Product::kFloat16: warp_exchange("mma16", &fragments, compute_product<Float16Pairs>, where); break;
    case Product::kTf32: warp_exchange("mma_tf32", &fragments, compute_product<Tf32>, where); break;
  }
}

}  // namespace emulator
