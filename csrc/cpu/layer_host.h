// What the host code of the layer's ops shares: the instruction set's kernels, parameters in arithmetic precision, and
// work cut into pieces by shape alone.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/instruction_set.h"
#include "cpu/layer_kernels.h"
#include "torch_api.h"

namespace rwkv {

inline const LayerKernels& kernels() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx512) return kLayerAvx512;
  if (instruction_set() == InstructionSet::kAvx2) return kLayerAvx2;
#endif
  return kLayerGeneric;
}

// Rows of this many elements that are worth a thread of their own.
inline int64_t grain_of(int64_t row_elements) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_elements));
}

using Tensors = std::vector<Tensor>;

// A parameter in arithmetic precision, contiguous: fp32, or fp64 beside fp64 activations.
inline Tensor real_copy(const Checks& check, const Tensor& x) {
  if (x.scalar_type() == check.state_dtype()) return made_contiguous(x);
  return converted(x, check.state_dtype());
}

// partial [blocks, parts, count]: the sum of one part over the blocks, in their order, in like's shape and dtype.
inline Tensor sum_of_blocks(const Tensor& partial, int64_t part, const Tensor& like) {
  const int64_t blocks = partial.size(0), parts = partial.size(1), count = partial.size(2);
  Tensor total = converted(like, partial.scalar_type());
  const auto add = [&](auto* sums, const auto* from) {
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += double(from[(block * parts + part) * count + i]);
      sums[i] = std::remove_pointer_t<decltype(sums)>(sum);
    }
  };
  if (partial.scalar_type() == ScalarType::Double)
    add(static_cast<double*>(total.data_ptr()), static_cast<const double*>(partial.data_ptr()));
  else
    add(static_cast<float*>(total.data_ptr()), static_cast<const float*>(partial.data_ptr()));
  return like.scalar_type() == total.scalar_type() ? total : converted(total, like.scalar_type());
}

inline int64_t blocks_of(int64_t rows) { return (rows + kPartialRows - 1) / kPartialRows; }

// Calls kernel(begin, end, scratch) for pieces of `rows`, each piece with `scratch_elements` doubles of its own.
template <class Kernel>
void for_rows(int64_t rows, int64_t grain, int64_t scratch_elements, const Kernel& kernel) {
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[size_t(scratch_elements)]);
    kernel(begin, end, scratch.get());
  });
}

}  // namespace rwkv
