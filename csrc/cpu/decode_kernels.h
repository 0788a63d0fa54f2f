// What one instruction set's translation unit offers to decode_cpu.cpp.
#pragma once

#include "cpu/crew.h"
#include "cpu/wkv_kernels.h"
#include "decode_params.h"

namespace rwkv {

struct DecodeKernels {
  int64_t (*scratch_floats)(const DecodeParams&);  // how much memory a token needs between its stages,
  int64_t (*member_floats)(const DecodeParams&);   // and how much each member of the crew for itself
  int64_t (*stages)(const DecodeParams&);
  void (*run)(const DecodeParams&, const WkvKernels&, float* scratch, float* own, CrewMember);
};

extern const DecodeKernels kDecodeGeneric;
#if defined(__x86_64__)
extern const DecodeKernels kDecodeAvx2;
extern const DecodeKernels kDecodeAvx512;
#endif

}  // namespace rwkv
