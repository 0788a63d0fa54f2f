// From each segment's decay W_s and state L_s from zeros to the states at the cuts:
//   S_0 = the op's state,   S_{s+1} = W_s S_s + L_s          (forward: S_s is the state before segment s)
//   G_n = the op's dstate_out,   G_s = W_s G_{s+1} + A_s     (adjoint: G_{s+1} is the gradient after segment s)
// Elements of a state never meet, so a thread carries four of them through all segments of a sequence.
#pragma once

#include "cuda/device_launch.h"
#include "cuda/element.cuh"
#include "cuda/wkv_segments.h"

namespace rwkv {

inline constexpr int kScanThreads = 256;
inline constexpr int kScanElements = 4 * kScanThreads;  // of a state, in one block
inline constexpr int kScanBatch = 4;                    // segments whose loads are on their way together

// Blocks per state.
RWKV_HOST_DEVICE constexpr int64_t scan_parts(const WkvShape& shape) {
  return (shape.head_size * shape.head_size + kScanElements - 1) / kScanElements;
}

template <class Real>
__global__ void __launch_bounds__(kScanThreads) wkv_scan_kernel(const __grid_constant__ ScanTask task) {
  const int64_t size = task.shape.head_size, square = size * size, heads = task.shape.heads;
  const int64_t parts = scan_parts(task.shape), pair = block_index() / parts, head = pair % heads;
  const int64_t element = block_index() % parts * kScanElements + 4 * thread_index(), key = element / size;
  const Segment start = segment_of(task.shape, task.work, pair / heads);
  if (start.item.sequence < 0 || !start.is_first() || start.item.segments == 1 || element >= square) return;

  // Segments in the order of the scan: slots first_slot, first_slot + step, ...
  const int segments = start.item.segments, step = task.adjoint ? -1 : 1;
  const int64_t first_slot = task.adjoint ? start.slot + segments - 1 : start.slot;
  const auto index_of = [&](int segment) { return (first_slot + segment * step) * heads + head; };
  Real* const states = static_cast<Real*>(task.segment_states) + element;
  const Real* const decays = static_cast<const Real*>(task.segment_decays) + key;
  const int64_t sequence = start.item.sequence * heads + head;

  Four<Real> state = {};
  if (task.initial) state = load_four_global(static_cast<const Real*>(task.initial) + sequence * square + element);
  Real decay = 1;
  const bool in_place = !task.final_state;
  const int taken = in_place ? segments - 1 : segments;  // the last segment's own state is of use to no other
  for (int first = 0; first < taken; first += kScanBatch) {
    Four<Real> own[kScanBatch];
    Real own_decay[kScanBatch];
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i)
      if (first + i < taken) {
        own[i] = load_four_global(states + index_of(first + i) * square);
        own_decay[i] = load_global<Real>(decays + index_of(first + i) * size);
      }
    // A segment's own state has been read by now, so the state before it may take its place.
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i)
      if (first + i < taken) {
        if (in_place && first + i > 0) store_four_global(states + index_of(first + i) * square, state);
#pragma unroll
        for (int c = 0; c < 4; ++c) state[c] = own_decay[i] * state[c] + own[i][c];
        decay *= own_decay[i];
      }
  }
  if (in_place) {
    store_four_global(states + index_of(taken) * square, state);
    return;
  }
  store_four_global(static_cast<Real*>(task.final_state) + sequence * square + element, state);
  if (task.final_decay && element % size == 0)
    store_global(static_cast<Real*>(task.final_decay) + sequence * size + key, decay);
}

template <class Real>
int run_wkv_scan(const ScanTask& task, void* stream) {
  return launch(wkv_scan_kernel<Real>, task.work.items * task.shape.heads * scan_parts(task.shape), kScanThreads, 0,
                task, stream);
}

}  // namespace rwkv
