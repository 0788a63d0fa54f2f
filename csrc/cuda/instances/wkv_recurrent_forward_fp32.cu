#include "cuda/wkv_recurrent_forward.cuh"

namespace rwkv {
template int run_wkv_recurrent_forward<float, 32>(const ForwardTask&, void*);
template int run_wkv_recurrent_forward<float, 64>(const ForwardTask&, void*);
template int run_wkv_recurrent_forward<float, 128>(const ForwardTask&, void*);
template int wkv_recurrent_forward_blocks<float, 32>(int64_t&);
template int wkv_recurrent_forward_blocks<float, 64>(int64_t&);
template int wkv_recurrent_forward_blocks<float, 128>(int64_t&);
}  // namespace rwkv
