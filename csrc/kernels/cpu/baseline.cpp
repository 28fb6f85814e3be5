// What every processor of the architecture can run.
#define TLCR_ISA baseline
#define TLCR_VECTOR_BYTES 16
#include "table.inl"
