// Operators that update a model, as declared in tlcr/ops/{adamw,layers}.py: the optimiser's step, and layers with their
// backward passes.
#pragma once

#include <tuple>

#include "tensors.h"

namespace tlcr {

// Changes everything but the gradients in place. Each list has as many tensors.
void adamw_step(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                const std::vector<Tensor>& remainders, double learning_rate, double beta1, double beta2, double eps,
                double weight_decay, int64_t step);

// Returns y, and 1 / sqrt(mean(x^2) + eps) of each row.
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps);

// Returns the gradients of x and weight.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& g_y, const Tensor& x, const Tensor& weight,
                                             const Tensor& scales);

Tensor gated_silu(const Tensor& gate, const Tensor& up);

// Returns the gradients of gate and up.
std::tuple<Tensor, Tensor> gated_silu_backward(const Tensor& g_y, const Tensor& gate, const Tensor& up);

}  // namespace tlcr
