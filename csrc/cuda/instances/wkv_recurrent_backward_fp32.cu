#include "cuda/wkv_recurrent_backward.cuh"

namespace rwkv {
template int run_wkv_recurrent_backward<float, 32>(const RecurrentBackwardTask&, void*);
template int run_wkv_recurrent_backward<float, 64>(const RecurrentBackwardTask&, void*);
template int run_wkv_recurrent_backward<float, 128>(const RecurrentBackwardTask&, void*);
template int wkv_recurrent_backward_needs<float, 32>(RecurrentBackwardNeeds&);
template int wkv_recurrent_backward_needs<float, 64>(RecurrentBackwardNeeds&);
template int wkv_recurrent_backward_needs<float, 128>(RecurrentBackwardNeeds&);
}  // namespace rwkv
