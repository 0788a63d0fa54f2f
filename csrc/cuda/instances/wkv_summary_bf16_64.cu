#include "cuda/wkv_summary.cuh"

namespace rwkv {
template int run_wkv_summary<BFloat16, BFloat16, 64, false>(const SummaryTask&, void*);
template int run_wkv_summary<BFloat16, float, 64, false>(const SummaryTask&, void*);
template int run_wkv_summary<BFloat16, float, 64, true>(const SummaryTask&, void*);
template int wkv_summary_blocks<BFloat16, BFloat16, 64, false>(int64_t&);
template int wkv_summary_blocks<BFloat16, float, 64, false>(int64_t&);
template int wkv_summary_blocks<BFloat16, float, 64, true>(int64_t&);
}  // namespace rwkv
