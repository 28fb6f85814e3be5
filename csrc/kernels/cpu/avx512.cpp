#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define TLCR_ISA avx512
#define TLCR_VECTOR_BYTES 64
#include "table.inl"
#endif
