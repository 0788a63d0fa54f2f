// The kernels of one instruction set: included once by each of wkv_generic.cpp, wkv_avx2.cpp and wkv_avx512.cpp, after
// the target pragma, with RWKV_ISA and RWKV_LANE_BYTES defined.

namespace rwkv::RWKV_ISA {
namespace {

#include "cpu/lanes.h"
#include "cpu/wkv_recurrence.h"
#include "cpu/wkv_adjoint.h"
#include "cpu/wkv_summary.h"

void forward(const WkvForwardParams& params, const Sequence& sequence, int64_t head) {
  params.shape.fp64 ? forward_sequence<double>(params, sequence, head)
                    : forward_sequence<float>(params, sequence, head);
}

void backward(const WkvBackwardParams& params, const Sequence& sequence, int64_t head) {
  if (params.shape.fp64)
    BackwardSequence<double>(params, sequence, head).run();
  else
    BackwardSequence<float>(params, sequence, head).run();
}

void summary(const WkvSummaryParams& params, const Sequence& sequence, int64_t head) {
  params.shape.fp64 ? summary_sequence<double>(params, sequence, head)
                    : summary_sequence<float>(params, sequence, head);
}

void step(const WkvStepParams& params, int64_t row, int64_t head) {
  params.shape.fp64 ? step_row<double>(params, row, head) : step_row<float>(params, row, head);
}

constexpr WkvKernels kernels(const char* name) { return {name, forward, backward, summary, step}; }

}  // namespace
}  // namespace rwkv::RWKV_ISA
