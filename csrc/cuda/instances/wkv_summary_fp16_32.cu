#include "cuda/wkv_summary.cuh"

namespace rwkv {
template int run_wkv_summary<Float16, Float16, 32, false>(const SummaryTask&, void*);
template int run_wkv_summary<Float16, float, 32, false>(const SummaryTask&, void*);
template int run_wkv_summary<Float16, float, 32, true>(const SummaryTask&, void*);
template int wkv_summary_blocks<Float16, Float16, 32, false>(int64_t&);
template int wkv_summary_blocks<Float16, float, 32, false>(int64_t&);
template int wkv_summary_blocks<Float16, float, 32, true>(int64_t&);
}  // namespace rwkv
