// The layer's ops on CPU tensors: checks, outputs, and work cut into pieces by shape alone, so that results do not depend
// on the number of threads.
#include <algorithm>
#include <memory>

#include "checks.h"
#include "cpu/instruction_set.h"
#include "cpu/layer_kernels.h"
#include "torch_api.h"

namespace rwkv {
namespace {

const LayerKernels& kernels() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx512) return kLayerAvx512;
  if (instruction_set() == InstructionSet::kAvx2) return kLayerAvx2;
#endif
  return kLayerGeneric;
}

// Rows of this many elements that are worth a thread of their own.
int64_t grain_of(int64_t row_elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_elements)); }

Tensor cross_entropy_rows(Tensor logits, const Tensor& targets, double l2wrap, bool overwrite) {
  const char* op = "cross_entropy_rows";
  const Checks check(op, logits, "logits");
  check.activation();
  if (logits.dim() != 2 || logits.size(1) < 1)
    fail(op, ": logits must have shape [rows, V] with V >= 1, got ", shape_text(logits));
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  if (vocab > 1 && logits.stride(1) != 1)
    fail(op, ": logits must have a unit last stride, because they are changed in place, got strides ",
         sizes_text(logits.strides().data(), 2), "; call .contiguous() and keep the result");
  check.shape("targets", targets, "[rows]", {rows});
  if (targets.scalar_type() != ScalarType::Long)
    fail(op, ": targets must be int64, got ", dtype_text(targets.scalar_type()), "; use .long()");
  const Tensor own_targets = made_contiguous(targets);
  Tensor loss = new_empty(logits, {rows}, check.state_dtype());
  CrossEntropyParams p;
  p.dtype = dtype_of(logits), p.vocab = vocab, p.row_stride = logits.stride(0);
  p.logits = logits.data_ptr(), p.loss = loss.data_ptr();
  p.targets = static_cast<const int64_t*>(own_targets.data_ptr());
  p.l2wrap = l2wrap, p.overwrite = overwrite;
  for (int64_t row = 0; row < rows; ++row)
    if (p.targets[row] < 0 || p.targets[row] >= vocab)
      fail<std::out_of_range>(op, ": targets must be from 0 to V - 1 = ", vocab - 1, ", got ", p.targets[row],
                              " at index ", row);
  parallel_for(rows, grain_of(vocab), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[size_t(vocab)]);
    kernels().cross_entropy(p, begin, end, scratch.get());
  });
  return loss;
}

}  // namespace
}  // namespace rwkv

STABLE_TORCH_LIBRARY_IMPL(rwkv_ext, CPU, m) { m.impl("cross_entropy_rows", TORCH_BOX(&rwkv::cross_entropy_rows)); }
