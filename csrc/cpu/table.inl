// The kernels of one instruction set: baseline.cpp, avx2.cpp and avx512.cpp name it in TLCR_ISA and include this.
#include "kernels.h"
#include "scoring.inl"

#define TLCR_QUOTE_(name) #name
#define TLCR_QUOTE(name) TLCR_QUOTE_(name)

namespace tlcr::cpu::TLCR_ISA {

extern const Kernels table;
const Kernels table = {
    TLCR_QUOTE(TLCR_ISA), score, score_backward, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace tlcr::cpu::TLCR_ISA
