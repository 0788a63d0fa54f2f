#include "cuda/wkv_recurrent_summary.cuh"

namespace rwkv {
template int run_wkv_recurrent_summary<double, 32>(const SummaryTask&, void*);
template int run_wkv_recurrent_summary<double, 64>(const SummaryTask&, void*);
template int run_wkv_recurrent_summary<double, 128>(const SummaryTask&, void*);
}  // namespace rwkv
