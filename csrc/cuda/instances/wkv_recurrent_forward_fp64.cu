#include "cuda/wkv_recurrent_forward.cuh"

namespace rwkv {
template int run_wkv_recurrent_forward<double, 32>(const ForwardTask&, void*);
template int run_wkv_recurrent_forward<double, 64>(const ForwardTask&, void*);
template int run_wkv_recurrent_forward<double, 128>(const ForwardTask&, void*);
template int wkv_recurrent_forward_blocks<double, 32>(int64_t&);
template int wkv_recurrent_forward_blocks<double, 64>(int64_t&);
template int wkv_recurrent_forward_blocks<double, 128>(int64_t&);
}  // namespace rwkv
