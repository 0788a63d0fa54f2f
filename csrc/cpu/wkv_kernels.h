// What one instruction set's translation unit offers to wkv_cpu.cpp. A kernel call handles one (sequence, head) pair,
// or some of its value columns.
#pragma once

#include "wkv_params.h"

namespace rwkv {

// Where a sequence lies: batch row, first token, tokens, first chunk state.
struct Sequence {
  int64_t index = 0;
  int64_t row = 0;
  int64_t first_token = 0;
  int64_t tokens = 0;
  int64_t first_chunk = 0;
};

// Value columns of a head: whole units, except for the last.
struct Columns {
  int64_t first = 0;
  int64_t count = 0;
};

inline constexpr int64_t kColumnUnit = 32;

struct WkvKernels {
  const char* instruction_set;
  void (*forward)(const WkvForwardParams&, const Sequence&, int64_t head, Columns);
  void (*backward)(const WkvBackwardParams&, const Sequence&, int64_t head, Columns);
  // The second part of a backward whose columns were divided, and the elements of partial_sums that it needs.
  void (*finish_backward)(const WkvBackwardParams&, const Sequence&, int64_t head);
  int64_t (*partial_sums)(const WkvShape&);
  void (*summary)(const WkvSummaryParams&, const Sequence&, int64_t head, Columns);
  void (*step)(const WkvStepParams&, int64_t row, int64_t head);
};

extern const WkvKernels kWkvGeneric;
#if defined(__x86_64__)
extern const WkvKernels kWkvAvx2;
extern const WkvKernels kWkvAvx512;
#endif

}  // namespace rwkv
