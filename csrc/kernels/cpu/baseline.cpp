// The CPU kernels compiled for the instructions that every processor of the architecture has.
#define TLCR_ISA baseline
#define TLCR_VECTOR_BYTES 16
#include "table.inl"
