#include "cuda/wkv_recurrent_backward.cuh"

namespace rwkv {
template int run_wkv_recurrent_backward<float, 32>(const RecurrentBackwardTask&, void*);
template int run_wkv_recurrent_backward<float, 64>(const RecurrentBackwardTask&, void*);
template int run_wkv_recurrent_backward<float, 128>(const RecurrentBackwardTask&, void*);
template int wkv_recurrent_backward_blocks<float, 32>(int64_t&, int64_t&);
template int wkv_recurrent_backward_blocks<float, 64>(int64_t&, int64_t&);
template int wkv_recurrent_backward_blocks<float, 128>(int64_t&, int64_t&);
}  // namespace rwkv
