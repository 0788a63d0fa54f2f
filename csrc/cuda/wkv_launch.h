// What the CUDA half offers: plan an op, give it that much workspace, launch it. No torch and no CUDA type: a stream is
// void*, an error is a cudaError_t as int (0: none). Nothing here waits for the device or allocates on it.
//
//   WkvPlan plan;
//   error = plan_wkv_forward(params, {}, plan);                   // which kernels, how many segments, how much memory
//   error = launch_wkv_forward(params, plan, workspace, stream);  // workspace: plan.workspace_bytes, 256-byte aligned
#pragma once

#include <optional>

#include "wkv_params.h"

namespace rwkv {

// Head sizes with kernels.
inline bool has_cuda_head_size(int64_t size) { return size == 32 || size == 64 || size == 128; }

enum class WkvKernel : int32_t {
  kChunk,      // 16 tokens at a time on tensor cores: bf16 and fp16 activations
  kRecurrent,  // one token at a time: fp32 and fp64 activations, short sequences, GPUs with little shared memory
};

// What a test insists on. plan_* answers kNotSupported where the kernel cannot run the op at all.
struct WkvForced {
  std::optional<WkvKernel> kernel;
  int64_t segment_tokens = 0;  // a multiple of kChunkTokens; 0: as the heuristic says
};

struct WkvPlan {
  WkvKernel kernel = WkvKernel::kRecurrent;
  int64_t segment_tokens = 1;  // >= all tokens: one segment per sequence
  int64_t items = 0;           // segments in all, per head; with cu_seqlens an upper bound
  int64_t workspace_bytes = 0;
  int64_t blocks = 0;          // of the recurrent backward kernel: its scratch is in the workspace

  bool is_segmented(const WkvShape& shape) const { return segment_tokens < shape.tokens; }
};

// Bytes that are read or written at once. States and what forward saved must start at a multiple of them; for chunk
// kernels also every row of r, k, v, w (if [B, T, H, N]), dy and the outputs. Recurrent kernels take any rows.
inline constexpr int64_t kVectorAlignment = 16;

// Makes a device the current one of this thread. The library has a CUDA runtime of its own, which goes by the context
// that torch made current, but a thread may have none yet.
int set_cuda_device(int index);

int plan_wkv_forward(const WkvForwardParams& params, const WkvForced& forced, WkvPlan& plan);
int launch_wkv_forward(const WkvForwardParams& params, const WkvPlan& plan, void* workspace, void* stream);

// Writes params.du and, for Eagle, params.dw_sum as well; du_partial and dw_partial of the params are not used.
int plan_wkv_backward(const WkvBackwardParams& params, const WkvForced& forced, WkvPlan& plan);
int launch_wkv_backward(const WkvBackwardParams& params, const WkvPlan& plan, void* workspace, void* stream);

int plan_wkv_summary(const WkvSummaryParams& params, const WkvForced& forced, WkvPlan& plan);
int launch_wkv_summary(const WkvSummaryParams& params, const WkvPlan& plan, void* workspace, void* stream);

int launch_wkv_step(const WkvStepParams& params, void* stream);

// What an error that any of these returned means, and whether it means that nothing was built for this GPU.
const char* cuda_error_text(int error);
bool cuda_error_is_missing_image(int error);

}  // namespace rwkv
