// The scoring operators, as declared in tlcr/ops/scoring.py.
#pragma once

#include <optional>
#include <tuple>

#include "tensors.h"

namespace tlcr {

// logprobs, entropy, ref_logprobs, kl, stats, ref_stats; those of an absent reference have no elements.
using Scores = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// The gradients of hidden, weight and bias; one that is not wanted has no elements.
using HiddenGradients = std::tuple<Tensor, Tensor, Tensor>;

Scores score_tokens(const Tensor& logits, const Tensor& token_ids, const MaybeTensor& ref_logits, double temperature,
                    const MaybeTensor& temperatures);

Tensor score_tokens_backward(const MaybeTensor& g_logprobs, const MaybeTensor& g_entropy, const MaybeTensor& g_kl,
                             const Tensor& logits, const Tensor& token_ids, const MaybeTensor& ref_logits,
                             double temperature, const MaybeTensor& temperatures, const Tensor& entropy,
                             const Tensor& kl, const Tensor& stats, const Tensor& ref_stats);

Scores score_hidden(const Tensor& hidden, const Tensor& weight, const Tensor& token_ids, const MaybeTensor& bias,
                    const MaybeTensor& ref_hidden, const MaybeTensor& ref_weight, const MaybeTensor& ref_bias,
                    double temperature, const MaybeTensor& temperatures, int64_t chunk_tokens);

HiddenGradients score_hidden_backward(const MaybeTensor& g_logprobs, const MaybeTensor& g_entropy,
                                      const MaybeTensor& g_kl, const Tensor& hidden, const Tensor& weight,
                                      const Tensor& token_ids, const MaybeTensor& bias, const MaybeTensor& ref_hidden,
                                      const MaybeTensor& ref_weight, const MaybeTensor& ref_bias, double temperature,
                                      const MaybeTensor& temperatures, int64_t chunk_tokens, const Tensor& entropy,
                                      const Tensor& kl, const Tensor& stats, const Tensor& ref_stats, bool wants_hidden,
                                      bool wants_weight, bool wants_bias);

}  // namespace tlcr
