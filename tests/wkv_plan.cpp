// Answers questions about csrc/cuda/wkv_plan.h for test_wkv_plan.py. Input, one question per line:
//   batch tokens heads head_size packed_sequences constant_decay dtype pass slots forced_segment_tokens
// packed_sequences 0: rows; dtype as in Dtype; pass as in WkvPass. Output, one answer per line:
//   kernel segment_tokens items segmented bytes list states decays du dw
#include <iostream>

#include "cuda/wkv_plan.h"

int main() {
  using namespace rwkv;
  WkvShape shape;
  int64_t packed_sequences, slots, forced;
  int dtype, pass;
  while (std::cin >> shape.batch >> shape.tokens >> shape.heads >> shape.head_size >> packed_sequences >>
         shape.constant_decay >> dtype >> pass >> slots >> forced) {
    shape.sequences = packed_sequences ? packed_sequences : shape.batch;
    shape.cu_seqlens = packed_sequences ? &shape : nullptr;  // only whether it is there matters
    shape.fp64 = Dtype(dtype) == Dtype::kFloat64;
    const WkvKernel kernel = choose_kernel(shape, Dtype(dtype), slots);
    const WkvPlan plan = plan_segments(shape, WkvPass(pass), kernel, slots, forced);
    const WkvWorkspace at = workspace_of(shape, WkvPass(pass), plan);
    std::cout << int(plan.kernel) << ' ' << plan.segment_tokens << ' ' << plan.items << ' ' << plan.is_segmented(shape)
              << ' ' << plan.workspace_bytes << ' ' << at.list << ' ' << at.states << ' ' << at.decays << ' ' << at.du
              << ' ' << at.dw << '\n';
  }
}
