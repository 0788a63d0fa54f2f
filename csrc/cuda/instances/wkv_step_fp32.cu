#include "cuda/wkv_step.cuh"

namespace rwkv {
template int run_wkv_step<float, 32>(const WkvStepParams&, void*);
template int run_wkv_step<float, 64>(const WkvStepParams&, void*);
template int run_wkv_step<float, 128>(const WkvStepParams&, void*);
}  // namespace rwkv
