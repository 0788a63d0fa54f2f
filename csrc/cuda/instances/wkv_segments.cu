#include "cuda/wkv_reduce.cuh"
#include "cuda/wkv_scan.cuh"
#include "cuda/wkv_work_list.cuh"

namespace rwkv {

int run_wkv_work_list(const WorkListTask& task, void* stream) {
  const auto kernel = task.shape.cu_seqlens_int64 ? wkv_work_list_kernel<int64_t> : wkv_work_list_kernel<int32_t>;
  return launch(kernel, 1, WorkListLayout::kThreads, WorkListLayout::kSharedBytes, task, stream);
}

template int run_wkv_scan<float>(const ScanTask&, void*);
template int run_wkv_scan<double>(const ScanTask&, void*);
template int run_wkv_reduce<float>(const ReduceTask&, void*);
template int run_wkv_reduce<double>(const ReduceTask&, void*);

}  // namespace rwkv
