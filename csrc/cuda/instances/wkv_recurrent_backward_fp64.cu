#include "cuda/wkv_recurrent_backward.cuh"

namespace rwkv {
template int run_wkv_recurrent_backward<double, 32>(const RecurrentBackwardTask&, void*);
template int run_wkv_recurrent_backward<double, 64>(const RecurrentBackwardTask&, void*);
template int run_wkv_recurrent_backward<double, 128>(const RecurrentBackwardTask&, void*);
template int wkv_recurrent_backward_blocks<double, 32>(int64_t&, int64_t&);
template int wkv_recurrent_backward_blocks<double, 64>(int64_t&, int64_t&);
template int wkv_recurrent_backward_blocks<double, 128>(int64_t&, int64_t&);
}  // namespace rwkv
