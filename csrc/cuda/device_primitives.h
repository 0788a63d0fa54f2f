// Everything the kernels ask of the GPU beyond plain C++: indices, barriers, shared and global memory, asynchronous
// copies, warp exchange, matrix products, number formats. PTX for sm_80 and newer. The second implementation of these
// names, tests/emulator/cuda/device_primitives.h, runs the same kernels on a CPU; a primitive belongs in both.
//
// Fragments below follow the PTX ISA (warp-level matrix instructions): group g = lane / 4, member t = lane % 4.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rwkv {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// ---- where this thread is ----
__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x & 31); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x >> 5); }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }

// ---- barriers: the only things that order shared memory between threads ----
__device__ __forceinline__ void block_barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// ---- memory ----
// The block's dynamic shared memory from byte_offset on, count elements of it. Every buffer has its own call; the
// emulator gives each offset its own allocation, so buffers may not overlap.
template <class T>
__device__ __forceinline__ T* shared_array(int byte_offset, [[maybe_unused]] int count) {
  extern __shared__ __align__(128) char dynamic_shared[];
  return reinterpret_cast<T*>(dynamic_shared + byte_offset);
}

// V is a number or vector of 2, 4, 8 or 16 bytes (uint16_t, float, double, uint2, float4 ...); the address must be a
// multiple of its size.
template <class V>
__device__ __forceinline__ V load_shared(const void* from) {
  return *static_cast<const V*>(from);
}
template <class V>
__device__ __forceinline__ void store_shared(void* to, V value) {
  *static_cast<V*>(to) = value;
}
template <class V>
__device__ __forceinline__ V load_global(const void* from) {
  return *static_cast<const V*>(from);
}
template <class V>
__device__ __forceinline__ void store_global(void* to, V value) {
  *static_cast<V*>(to) = value;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes, both addresses multiples of 16. They are there after wait_copies and a barrier.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same, or 16 zero bytes where not wanted; the global address must be legal all the same.
__device__ __forceinline__ void copy_async_or_zero(void* shared, const void* global, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(wanted ? 16 : 0)
               : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's newest groups are still on their way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- exchange in a warp: all 32 lanes take part; gives no order to shared memory ----
__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ double shuffle_xor(double value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ float shuffle(float value, int lane) { return __shfl_sync(~0u, value, lane); }
__device__ __forceinline__ uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(~0u, value, lane); }

// Four 8 x 8 matrices of 16-bit elements: lanes 8m .. 8m + 7 give the 16-byte rows of matrix m; d[m] gets elements
// (row g, columns 2t and 2t + 1), low half first.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same transposed: d[m] gets elements (rows 2t and 2t + 1, column g).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// The inverse of load_matrices_transposed: the 16 bytes that lane 8m + i names become row i of matrix m.
__device__ __forceinline__ void store_matrices_transposed(void* row, const uint32_t (&d)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
               : "memory");
#else
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    uint32_t pair;  // of row g, columns 2t and 2t + 1
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(pair) : "r"(d[m]));
    const uint32_t to = shuffle(shared_address(row), 8 * m + lane_index() / 4) + 4 * (lane_index() % 4);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(pair) : "memory");
  }
#endif
}

// ---- matrix products, fp32 accumulators: c += a b ----
// c[2h + e] is (row g + 8h, column 2t + e).
// 16 x 16 by 16 x 8, 16-bit pairs: a[h + 2q] is (row g + 8h, columns 8q + 2t and 8q + 2t + 1); bq is (rows 8q + 2t
// and 8q + 2t + 1, column g).
template <class T>
__device__ __forceinline__ void mma16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma16<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma16<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// 16 x 8 by 8 x 8, tf32 (the low 13 bits of an operand are ignored): a[h + 2q] is (row g + 8h, column t + 4q);
// bq is (row t + 4q, column g).
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
                 "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// The same with c = a b: the accumulators need not be cleared first.
__device__ __forceinline__ void mma_tf32_from_zero(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
                 "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)), "f"(0.f));
}

// ---- number formats ----
__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }

// 2^x to about 2 ulp; subnormal results are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Nearest tf32, ties to even, so that mma_tf32's truncation is exact. NaN stays NaN: adding half a unit to the bits
// would carry the hardware's NaN over to -0.
__device__ __forceinline__ float round_tf32(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t bits;
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return float_from_bits(bits);
#else  // the instruction for it came with sm_90
  const uint32_t bits = float_bits(x);
  return float_from_bits(x != x ? 0x7fffffffu : (bits + 0xfffu + (bits >> 13 & 1u)) & 0xffffe000u);
#endif
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<BFloat16>(uint32_t pair) {
  return make_float2(float_from_bits(pair << 16), float_from_bits(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<Float16>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// The same as unpack, by another instruction where there is one: values that a matrix product needs both as first and
// as second operand lie in different registers for each; from one unpack the compiler would copy them every time.
template <class T>
__device__ __forceinline__ float2 unpack_again(uint32_t pair) {
  return unpack<T>(pair);
}
template <>
__device__ __forceinline__ float2 unpack_again<BFloat16>(uint32_t pair) {
  uint32_t low, high;
  asm("prmt.b32 %0, %1, 0, 0x1044;" : "=r"(low) : "r"(pair));
  asm("prmt.b32 %0, %1, 0, 0x3244;" : "=r"(high) : "r"(pair));
  return make_float2(float_from_bits(low), float_from_bits(high));
}

// Two floats rounded to nearest even, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

}  // namespace rwkv
