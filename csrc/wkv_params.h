// Plain structs that host code fills and every kernel, CPU or CUDA, reads. No torch, no allocation, no ownership.
// Shapes: r, k, v, w, y and their gradients [B, T, H, N]; u [H, N]; state [S, H, N(key), N(value)], S sequences.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RWKV_HOST_DEVICE __host__ __device__
#else
#define RWKV_HOST_DEVICE
#endif

namespace rwkv {

enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

inline constexpr int64_t kChunkTokens = 128;  // tokens between two states kept for backward

inline constexpr int64_t kScoresPerToken = 16;  // kept for backward by the CUDA chunk kernels

RWKV_HOST_DEVICE constexpr int64_t chunks_of(int64_t tokens) { return (tokens + kChunkTokens - 1) / kChunkTokens; }

// A tensor seen as [B, T, H, N]: strides in elements, the last one is 1; 0 repeats (Eagle's w over B and T).
struct View {
  void* data = nullptr;  // nullptr: an absent tensor
  Dtype dtype = Dtype::kFloat32;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// A sequence is one batch row, or tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1 of row 0 when packed.
struct WkvShape {
  int64_t batch = 0;
  int64_t tokens = 0;  // per batch row
  int64_t heads = 0;
  int64_t head_size = 0;
  int64_t sequences = 0;
  int64_t chunks = 0;          // chunk states in all
  const void* cu_seqlens = nullptr;  // nullptr: not packed
  bool cu_seqlens_int64 = true;
  bool constant_decay = false;  // Eagle: one w for all tokens
  bool fp64 = false;            // arithmetic, state and chunk states in fp64, else fp32
};

struct WkvForwardParams {
  WkvShape shape;
  View r, k, v, w, u;  // inputs
  View y;              // output
  const void* state = nullptr;   // [S, H, N, N] contiguous; nullptr: zeros
  void* state_out = nullptr;     // [S, H, N, N] contiguous
  void* chunk_states = nullptr;  // [chunks, H, N, N] contiguous; nullptr: not saved
  void* scores = nullptr;        // [B, H, T, 16] fp32 (CUDA): A of each token's 16-token chunk; or nullptr
};

struct WkvBackwardParams {
  WkvShape shape;
  View r, k, v, w, u, dy;      // inputs; dy may be absent
  View dr, dk, dv, dw;         // outputs; dw is absent for Eagle, whose sum goes through dw_partial
  const void* dstate_out = nullptr;    // [S, H, N, N]; nullptr: zeros
  const void* chunk_states = nullptr;  // as forward saved it
  const void* scores = nullptr;        // as forward saved it
  void* dstate = nullptr;              // [S, H, N, N]; nullptr: not wanted
  double* du_partial = nullptr;        // [S, H, N]: one sequence's share
  double* dw_partial = nullptr;        // [S, H, N] (Eagle)
  void* partial_sums = nullptr;        // CPU: where the value columns of a head are divided
  View du, dw_sum;                     // [H, N], u's and w's dtype: CUDA's own second stage writes them (dw_sum: Eagle)
};

// A sequence seen from outside: the state after it is decay * (state before it) + state. The same of the adjoint, which
// runs against time: r and dy stand in for k and v, and state is the gradient of sum(y * dy) by the state before it.
struct WkvSummaryParams {
  WkvShape shape;
  View k, v, w;            // r, dy, w of the adjoint
  bool adjoint = false;
  void* decay = nullptr;   // [S, H, N] contiguous: product of exp(-exp(w)); nullptr: not wanted
  void* state = nullptr;   // [S, H, N, N] contiguous: from zeros
};

struct WkvStepParams {
  WkvShape shape;      // tokens = 1, sequences = slots in state
  View r, k, v, w, u;  // [B, H, N] with token_stride 0
  View y;
  void* state = nullptr;           // [S, H, N, N] contiguous, updated in place
  const int64_t* slots = nullptr;  // [B], -1: skip the row; nullptr: row b uses slot b
};

}  // namespace rwkv
