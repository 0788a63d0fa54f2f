// From here on this translation unit is compiled for AVX2. Included after everything else that is shared.
#pragma GCC target("avx2,fma,f16c")
#define RWKV_ISA avx2
#define RWKV_LANE_BYTES 32
