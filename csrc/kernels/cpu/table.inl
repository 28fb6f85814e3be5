// The kernels of one instruction set: baseline.cpp, avx2.cpp and avx512.cpp name it in TLCR_ISA and include this.
#include "kernels.h"  // before the others, which use its arguments

#include "adamw.inl"
#include "gae.inl"
#include "layers.inl"
#include "ppo.inl"
#include "reward.inl"
#include "scoring.inl"
#include "whiten.inl"

#define TLCR_QUOTE_(name) #name
#define TLCR_QUOTE(name) TLCR_QUOTE_(name)

namespace tlcr::cpu::TLCR_ISA {

extern const Kernels table;
const Kernels table = {
    TLCR_QUOTE(TLCR_ISA),
    score,
    score_backward,
    reward,
    hidden_reward,
    gae,
    whiten,
    ppo,
    ppo_count,
    ppo_weigh,
    ppo_finish,
    ppo_backward,
    adamw,
    rms_norm,
    rms_norm_backward,
    gated_silu,
    gated_silu_backward,
};

}  // namespace tlcr::cpu::TLCR_ISA
