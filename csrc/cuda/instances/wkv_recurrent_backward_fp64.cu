#include "cuda/wkv_recurrent_backward.cuh"

namespace rwkv {
template int run_wkv_recurrent_backward<double, 32>(const RecurrentBackwardTask&, void*);
template int run_wkv_recurrent_backward<double, 64>(const RecurrentBackwardTask&, void*);
template int run_wkv_recurrent_backward<double, 128>(const RecurrentBackwardTask&, void*);
template int wkv_recurrent_backward_needs<double, 32>(RecurrentBackwardNeeds&);
template int wkv_recurrent_backward_needs<double, 64>(RecurrentBackwardNeeds&);
template int wkv_recurrent_backward_needs<double, 128>(RecurrentBackwardNeeds&);
}  // namespace rwkv
