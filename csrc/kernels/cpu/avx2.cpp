#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define TLCR_ISA avx2
#define TLCR_VECTOR_BYTES 32
#include "table.inl"
#endif
