#include "cuda/wkv_backward.cuh"

namespace rwkv {
template int run_wkv_backward<BFloat16, BFloat16, 128, false>(const BackwardTask&, void*);
template int run_wkv_backward<BFloat16, float, 128, false>(const BackwardTask&, void*);
template int run_wkv_backward<BFloat16, float, 128, true>(const BackwardTask&, void*);
template int wkv_backward_blocks<BFloat16, BFloat16, 128, false>(int64_t&);
template int wkv_backward_blocks<BFloat16, float, 128, false>(int64_t&);
template int wkv_backward_blocks<BFloat16, float, 128, true>(int64_t&);
}  // namespace rwkv
