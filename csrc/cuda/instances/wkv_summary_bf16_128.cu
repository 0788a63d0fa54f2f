#include "cuda/wkv_summary.cuh"

namespace rwkv {
template int run_wkv_summary<BFloat16, BFloat16, 128, false>(const SummaryTask&, void*);
template int run_wkv_summary<BFloat16, float, 128, false>(const SummaryTask&, void*);
template int run_wkv_summary<BFloat16, float, 128, true>(const SummaryTask&, void*);
template int wkv_summary_blocks<BFloat16, BFloat16, 128, false>(int64_t&);
template int wkv_summary_blocks<BFloat16, float, 128, false>(int64_t&);
template int wkv_summary_blocks<BFloat16, float, 128, true>(int64_t&);
}  // namespace rwkv
