// The kernels of one instruction set: included once by each of wkv_generic.cpp, wkv_avx2.cpp and wkv_avx512.cpp, after
// the target pragma, with RWKV_ISA and RWKV_LANE_BYTES defined.

namespace rwkv::RWKV_ISA {
namespace {

#include "cpu/lanes.h"
#include "cpu/elements.h"
#include "cpu/rows.h"
#include "cpu/wkv_block.h"
#include "cpu/wkv_forward.h"
#include "cpu/wkv_backward_panels.h"
#include "cpu/wkv_backward.h"
#include "cpu/wkv_summary.h"
#include "cpu/wkv_step.h"

// Calls body(arithmetic type, head size as a constant): the usual head sizes in fp32, 0 (any) for the rest.
template <class Body>
inline void for_instance(const WkvShape& shape, const Body& body) {
  using Any = std::integral_constant<int, 0>;
  if (shape.fp64) return body(double(), Any());
  switch (shape.head_size) {
    case 32: return body(float(), std::integral_constant<int, 32>());
    case 64: return body(float(), std::integral_constant<int, 64>());
    case 128: return body(float(), std::integral_constant<int, 128>());
    default: return body(float(), Any());
  }
}

void forward(const WkvForwardParams& params, const Sequence& sequence, int64_t head, Columns columns) {
  for_instance(params.shape, [&](auto real, auto size) {
    ForwardSequence<decltype(real), size()>(params, sequence, head, columns).run();
  });
}

void backward(const WkvBackwardParams& params, const Sequence& sequence, int64_t head, Columns columns) {
  for_instance(params.shape, [&](auto real, auto size) {
    BackwardSequence<decltype(real), size()>(params, sequence, head, columns).run();
  });
}

void finish_backward(const WkvBackwardParams& params, const Sequence& sequence, int64_t head) {
  constexpr Columns kNone = {0, 0};  // what is left touches no state: memory for none
  for_instance(params.shape, [&](auto real, auto size) {
    BackwardSequence<decltype(real), size()>(params, sequence, head, kNone).finish();
  });
}

int64_t partial_sums(const WkvShape& shape) {
  const int64_t stride = padded(shape.head_size, shape.fp64 ? kLanes<double> : kLanes<float>);
  const int64_t units = padded(shape.head_size, kColumnUnit) / kColumnUnit;
  return units * shape.chunks * shape.heads * kChunkBlocks * kSums * stride;
}

void summary(const WkvSummaryParams& params, const Sequence& sequence, int64_t head, Columns columns) {
  for_instance(params.shape, [&](auto real, auto size) {
    SummarySequence<decltype(real), size()>(params, sequence, head, columns).run();
  });
}

void step(const WkvStepParams& params, int64_t row, int64_t head) {
  for_instance(params.shape, [&](auto real, auto size) { step_row<decltype(real), size()>(params, row, head); });
}

constexpr WkvKernels kernels(const char* name) {
  return {name, forward, backward, finish_backward, partial_sums, summary, step};
}

}  // namespace
}  // namespace rwkv::RWKV_ISA
