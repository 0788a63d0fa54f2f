// Operations of a whole warp, by the layouts of the PTX ISA. Each one waits for all 32 lanes at the same place of the
// source and gives no order to memory.
#pragma once

#include <cstdint>

#include "report.h"

namespace emulator {

uint32_t exchange_lane(uint32_t value, int source_lane, const char* name, const Location& where);

struct MatrixRow {
  uint32_t words[4];
};
void distribute_matrices(uint32_t (&d)[4], const MatrixRow& row, bool transposed, const Location& where);

// The row of store_matrices_transposed that this lane names.
MatrixRow collect_matrix_row(const uint32_t (&d)[4], const Location& where);

enum class Product { kBFloat16, kFloat16, kTf32 };
// c += a b (from_zero: c = a b) for fragments of m16n8k16 (16-bit pairs) or m16n8k8 (tf32).
void multiply_fragments(Product product, bool from_zero, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                        uint32_t b1, const Location& where);

}  // namespace emulator
