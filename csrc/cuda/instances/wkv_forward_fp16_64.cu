#include "cuda/wkv_forward.cuh"

namespace rwkv {
template int run_wkv_forward<Float16, Float16, 64, false>(const ForwardTask&, void*);
template int run_wkv_forward<Float16, float, 64, false>(const ForwardTask&, void*);
template int run_wkv_forward<Float16, float, 64, true>(const ForwardTask&, void*);
template int wkv_forward_blocks<Float16, Float16, 64, false>(int64_t&);
template int wkv_forward_blocks<Float16, float, 64, false>(int64_t&);
template int wkv_forward_blocks<Float16, float, 64, true>(int64_t&);
}  // namespace rwkv
