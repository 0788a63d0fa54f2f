// What one block works on: a segment of one sequence, and where that segment's tokens and saved states lie.
// Packed sequences differ in length, so the blocks look their segment up in a list that a kernel builds from
// cu_seqlens (wkv_segments.cuh); rows of equal length need no list.
#pragma once

#include "cuda/device_primitives.h"
#include "wkv_params.h"

namespace rwkv {

struct WorkItem {
  int32_t sequence;  // -1: nothing to do
  int32_t segment;   // of the sequence
  int32_t segments;  // of the sequence, at least 1
  int32_t padding;
  int64_t first_token;  // in the batch row
  int64_t tokens;       // 0 for an empty sequence
};

struct WorkSchedule {
  const WorkItem* list = nullptr;  // [items] when packed; nullptr: every row has tokens / segment_tokens segments
  int64_t segment_tokens = 0;      // a multiple of kChunkTokens, or >= all tokens: one segment per sequence
  int64_t items = 0;               // blocks per head; with a list, an upper bound
};

// A segment and the addresses that follow from it. Slots number segments, chunks number saved states; both leave gaps
// when packed, because sequence s starts at begin / size + s, which needs no prefix sum over the lengths.
struct Segment {
  WorkItem item;
  int64_t row;          // batch row
  int64_t slot;         // among the segments of the batch, less than items
  int64_t first_chunk;  // among the chunk states of the batch

  __device__ bool is_first() const { return item.segment == 0; }
  __device__ bool is_last() const { return item.segment + 1 == item.segments; }
};

__device__ inline Segment segment_of(const WkvShape& shape, const WorkSchedule& work, int64_t index) {
  Segment found;
  if (work.list) {
    found.item = work.list[index];
    const int64_t begin = found.item.first_token - found.item.segment * work.segment_tokens;  // of the sequence
    found.row = 0;
    found.slot = begin / work.segment_tokens + found.item.sequence + found.item.segment;
    found.first_chunk = begin / kChunkTokens + found.item.sequence +
                        found.item.segment * (work.segment_tokens / kChunkTokens);
    return found;
  }
  const int64_t segments = work.items / shape.sequences;
  found.item.sequence = static_cast<int32_t>(index / segments);
  found.item.segment = static_cast<int32_t>(index % segments);
  found.item.segments = static_cast<int32_t>(segments);
  found.item.first_token = found.item.segment * work.segment_tokens;
  const int64_t left = shape.tokens - found.item.first_token;
  found.item.tokens = left < work.segment_tokens ? left : work.segment_tokens;
  found.row = found.item.sequence;
  found.slot = index;
  found.first_chunk = found.row * chunks_of(shape.tokens) + found.item.first_token / kChunkTokens;
  return found;
}

// The first token of the segment in one of the op's tensors, channel 0.
template <class T>
__device__ inline T* start_of(const View& view, const Segment& segment, int64_t head) {
  return static_cast<T*>(view.data) + segment.row * view.batch_stride + segment.item.first_token * view.token_stride +
         head * view.head_stride;
}

// ---- what the kernels are launched with ----

struct ForwardTask {
  WkvForwardParams op;
  WorkSchedule work;
  const float* segment_states = nullptr;  // [items, H, N, N]: state at the start of each segment but a sequence's first
};

struct BackwardTask {
  WkvBackwardParams op;
  WorkSchedule work;
  // [items, H, N, N]: gradient of the state at the end of each segment but a sequence's last
  const float* segment_dstates = nullptr;
  float* du_partial = nullptr;             // [items, H, N]
  float* dw_partial = nullptr;             // [items, H, N] (Eagle)
};

}  // namespace rwkv
