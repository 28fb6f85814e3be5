// What every processor of the architecture can run.
#define TLCR_ISA baseline
#include "table.inl"
