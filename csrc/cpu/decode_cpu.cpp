// One token through a whole model on CPU tensors, in one parallel region. Work is divided by shape and taken by
// whichever thread is free, so results do not depend on the number of threads.
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "cpu/decode_kernels.h"
#include "cpu/instruction_set.h"
#include "cpu/denormals.h"
#include "decode_prepare.h"

namespace rwkv {
namespace {

std::pair<const DecodeKernels&, const WkvKernels&> kernels() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::kAvx512: return {kDecodeAvx512, kWkvAvx512};
    case InstructionSet::kAvx2: return {kDecodeAvx2, kWkvAvx2};
    default: break;
  }
#endif
  return {kDecodeGeneric, kWkvGeneric};
}

template <bool kFinch>
Tensor step(const Tensor& x, TensorList weights, TensorList scales, Tensor att_shift, Tensor wkv, Tensor ffn_shift,
            const OptionalTensor& slots) {
  const char* op = kFinch ? "rwkv6_step" : "rwkv5_step";
  const DecodeCall call = prepare_decode(op, kFinch, x, weights, scales, att_shift, wkv, ffn_shift, slots);
  const DecodeParams& p = call.params;
  if (!p.batch || !p.vocabulary) return call.logits;
  const auto [decode, wkv_kernels] = kernels();
  // All of it now: a failure inside the step would leave the state half updated.
  const int64_t shared = decode.scratch_floats(p), own = decode.member_floats(p), threads = thread_count();
  const std::unique_ptr<float, void (*)(void*)> scratch(
      static_cast<float*>(std::aligned_alloc(64, size_t(shared + threads * own) * sizeof(float))), std::free);
  if (!scratch) throw std::bad_alloc();
  Crew crew(decode.stages(p));
  // Every thread that comes joins the crew once, however the loop deals out its numbers.
  parallel_for(threads, 1, [&](int64_t number, int64_t) {
    const FlushDenormals flush;
    decode.run(p, wkv_kernels, scratch.get(), scratch.get() + shared + number * own, CrewMember(crew));
  });
  return call.logits;
}

}  // namespace
}  // namespace rwkv

STABLE_TORCH_LIBRARY_IMPL(rwkv_ext, CPU, m) {
  m.impl("rwkv5_step", TORCH_BOX(&rwkv::step<false>));
  m.impl("rwkv6_step", TORCH_BOX(&rwkv::step<true>));
}
