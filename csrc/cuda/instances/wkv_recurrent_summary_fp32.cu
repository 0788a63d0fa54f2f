#include "cuda/wkv_recurrent_summary.cuh"

namespace rwkv {
template int run_wkv_recurrent_summary<float, 32>(const SummaryTask&, void*);
template int run_wkv_recurrent_summary<float, 64>(const SummaryTask&, void*);
template int run_wkv_recurrent_summary<float, 128>(const SummaryTask&, void*);
}  // namespace rwkv
