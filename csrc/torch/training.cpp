#include "training.h"

#include <cmath>

#include "run.h"

namespace tlcr {

void adamw_step(const Tensor& parameter, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                const Tensor& remainder, double learning_rate, double beta1, double beta2, double eps,
                double weight_decay, int64_t step) {
  const InPlace weights(parameter), means(exp_avg), squares(exp_avg_sq), remainders(remainder);
  const Tensor gradients = dense(grad);
  const AdamWArguments arguments{parameter.numel(),
                                 static_cast<uint16_t*>(weights.data()),
                                 static_cast<int16_t*>(remainders.data()),
                                 static_cast<float*>(means.data()),
                                 static_cast<float*>(squares.data()),
                                 pointer(gradients),
                                 1 - learning_rate * weight_decay,
                                 beta1,
                                 beta2,
                                 learning_rate / (1 - std::pow(beta1, step)),
                                 std::sqrt(1 - std::pow(beta2, step)),
                                 eps};
  on_threads(cpu::kernels().adamw, arguments, arguments.count, 1);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Tensor rows = dense(x), weights = dense(weight), y = empty_as(rows);
  const Tensor scales =
      empty({rows.numel() / std::max<int64_t>(1, weight.numel())}, real_dtype(x), x);
  const RMSNormArguments arguments{
      type_of(x), scales.numel(), weight.numel(), pointer(rows), pointer(weights), eps, pointer(y),
      pointer(scales)};
  on_threads(cpu::kernels().rms_norm, arguments, arguments.rows, arguments.width);
  return {y, scales};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& g_y, const Tensor& x, const Tensor& weight,
                                             const Tensor& scales) {
  const Tensor rows = dense(x), weights = dense(weight), g = dense(g_y), g_x = empty_as(rows);
  const int64_t parts = (scales.numel() + kNormRows - 1) / kNormRows;
  const Tensor g_weight_parts = empty({parts, weight.numel()}, dtype_of(scales), scales);
  const RMSNormBackwardArguments arguments{type_of(x), scales.numel(), weight.numel(),  pointer(rows),
                                           pointer(weights),         pointer(g),     pointer(scales), pointer(g_x),
                                           pointer(g_weight_parts)};
  on_threads(cpu::kernels().rms_norm_backward, arguments, parts, kNormRows * arguments.width);
  return {g_x, cast(torch::stable::sum(g_weight_parts, {{0}}), dtype_of(weight))};
}

Tensor gated_silu(const Tensor& gate, const Tensor& up) {
  const Tensor gates = dense(gate), ups = dense(up), y = empty_as(gates);
  const GatedSiLUArguments arguments{type_of(gate), gate.numel(), pointer(gates), pointer(ups),
                                     pointer(y)};
  on_threads(cpu::kernels().gated_silu, arguments, arguments.count, 1);
  return y;
}

std::tuple<Tensor, Tensor> gated_silu_backward(const Tensor& g_y, const Tensor& gate, const Tensor& up) {
  const Tensor gates = dense(gate), ups = dense(up), g = dense(g_y);
  const Tensor g_gate = empty_as(gates), g_up = empty_as(ups);
  const GatedSiLUBackwardArguments arguments{type_of(gate),
                                             gate.numel(),
                                             pointer(gates),
                                             pointer(ups),
                                             pointer(g),
                                             pointer(g_gate),
                                             pointer(g_up)};
  on_threads(cpu::kernels().gated_silu_backward, arguments, arguments.count, 1);
  return {g_gate, g_up};
}

}  // namespace tlcr
