// The CPU kernels, compiled once per instruction set. Each works on a range of rows; the caller chooses the threads.
#pragma once

#include "../arguments.h"

namespace tlcr::cpu {

struct Kernels {
  const char* instruction_set;  // "avx512", "avx2" or "baseline"
  void (*score)(const ScoreArguments&, int64_t begin, int64_t end);
  void (*score_backward)(const ScoreBackwardArguments&, int64_t begin, int64_t end);
  void (*reward)(const RewardArguments&, int64_t begin, int64_t end);               // rows of the batch
  void (*hidden_reward)(const HiddenRewardArguments&, int64_t begin, int64_t end);  // rows of the batch
  void (*gae)(const GaeArguments&, int64_t begin, int64_t end);                     // sequences
  void (*whiten)(const WhitenArguments&);
  void (*ppo)(const PPOArguments&, int64_t begin, int64_t end);  // rows of the batch: fills row_sums
  void (*ppo_count)(const PPOArguments&, int64_t begin,
                    int64_t end);           // rows of the batch: of row_sums the counts alone
  void (*ppo_weigh)(const PPOArguments&);   // all rows: row_weights, from the counts
  void (*ppo_finish)(const PPOArguments&);  // all rows: stats, from row_sums
  void (*ppo_backward)(const PPOBackwardArguments&, int64_t begin, int64_t end);
  void (*adamw)(const AdamWArguments&, int64_t begin, int64_t end);                        // weights
  void (*rms_norm)(const RMSNormArguments&, int64_t begin, int64_t end);                   // rows
  void (*rms_norm_backward)(const RMSNormBackwardArguments&, int64_t begin, int64_t end);  // kNormRows rows each
  void (*gated_silu)(const GatedSiLUArguments&, int64_t begin, int64_t end);               // elements
  void (*gated_silu_backward)(const GatedSiLUBackwardArguments&, int64_t begin, int64_t end);
};

// The best table that this processor can run. ATEN_CPU_CAPABILITY, which limits torch's own kernels when it is "avx2"
// or "default", limits these too; it is read once.
const Kernels& kernels();

}  // namespace tlcr::cpu
