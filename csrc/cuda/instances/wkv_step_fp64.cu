#include "cuda/wkv_step.cuh"

namespace rwkv {
template void run_wkv_step<double, 32>(const WkvStepParams&, cudaStream_t);
template void run_wkv_step<double, 64>(const WkvStepParams&, cudaStream_t);
template void run_wkv_step<double, 128>(const WkvStepParams&, cudaStream_t);
}  // namespace rwkv
