// What the recurrent backward kernel is launched with, and what it needs for that.
#pragma once

#include "cuda/wkv_work.h"
#include "wkv_params.h"

namespace rwkv {

// The pointers are to Real, which is float or double as the op says.
struct RecurrentBackwardTask {
  WkvBackwardParams op;
  WorkSchedule work;
  const void* segment_dstates = nullptr;  // [items, H, N, N]: gradient of the state at the end of all segments but last
  void* du_partial = nullptr;             // [items, H, N]
  void* dw_partial = nullptr;             // [items, H, N] (Eagle)
  int64_t blocks = 0;                     // launched: each takes every blocks-th (segment, head)
  void* block_states = nullptr;           // [blocks, states of a chunk, N, N]: scratch
  void* dv_shares = nullptr;              // [B, T, H, N]: scratch where dv is too coarse to add up in; or nullptr
};

struct RecurrentBackwardNeeds {
  int64_t pairs = 0;          // (segment, head) pairs that the device works on at once
  int64_t scratch_bytes = 0;  // of one block's block_states
  bool dv_shares = false;     // unless dv is Real
};

}  // namespace rwkv
