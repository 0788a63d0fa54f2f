#include "cuda/wkv_backward.cuh"

namespace rwkv {
template int run_wkv_backward<Float16, Float16, 64, false>(const BackwardTask&, void*);
template int run_wkv_backward<Float16, float, 64, false>(const BackwardTask&, void*);
template int run_wkv_backward<Float16, float, 64, true>(const BackwardTask&, void*);
template int wkv_backward_blocks<Float16, Float16, 64, false>(int64_t&);
template int wkv_backward_blocks<Float16, float, 64, false>(int64_t&);
template int wkv_backward_blocks<Float16, float, 64, true>(int64_t&);
}  // namespace rwkv
