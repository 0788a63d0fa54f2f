// The decode kernels of one instruction set: included once by each of decode_generic.cpp, decode_avx2.cpp and
// decode_avx512.cpp, after the target pragma, with RWKV_ISA and RWKV_LANE_BYTES defined.

namespace rwkv::RWKV_ISA {
namespace {

#include "cpu/lanes.h"
#include "cpu/elements.h"
#include "cpu/rows.h"
#include "cpu/decode_matrix.h"
#include "cpu/decode_vector.h"
#include "cpu/decode_token.h"

constexpr DecodeKernels decode_kernels() { return {scratch_floats, member_floats, stages_of, run_token}; }

}  // namespace
}  // namespace rwkv::RWKV_ISA
