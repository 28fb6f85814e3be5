#include "training.h"

#include <cmath>

#include "run.h"

namespace tlcr {

void adamw_step(const Tensor& parameter, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                const Tensor& remainder, double learning_rate, double beta1, double beta2, double eps,
                double weight_decay, int64_t step) {
  const InPlace weights(parameter), means(exp_avg), squares(exp_avg_sq), remainders(remainder);
  const Tensor gradients = grad.contiguous();
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
  on_threads(cpu_kernels().adamw, arguments, arguments.count, 1);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Tensor rows = x.contiguous(), weights = weight.contiguous(), y = at::empty_like(rows);
  const Tensor scales =
      at::empty({rows.numel() / std::max<int64_t>(1, weight.numel())}, x.options().dtype(real_dtype({x})));
  const RMSNormArguments arguments{
      type_of(x.scalar_type()), scales.numel(), weight.numel(), pointer(rows), pointer(weights), eps, pointer(y),
      pointer(scales)};
  on_threads(cpu_kernels().rms_norm, arguments, arguments.rows, arguments.width);
  return {y, scales};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& g_y, const Tensor& x, const Tensor& weight,
                                             const Tensor& scales) {
  const Tensor rows = x.contiguous(), weights = weight.contiguous(), g = g_y.contiguous(), g_x = at::empty_like(rows);
  const int64_t parts = (scales.numel() + kNormRows - 1) / kNormRows;
  const Tensor g_weight_parts = at::empty({parts, weight.numel()}, scales.options());
  const RMSNormBackwardArguments arguments{type_of(x.scalar_type()), scales.numel(), weight.numel(),  pointer(rows),
                                           pointer(weights),         pointer(g),     pointer(scales), pointer(g_x),
                                           pointer(g_weight_parts)};
  on_threads(cpu_kernels().rms_norm_backward, arguments, parts, kNormRows * arguments.width);
  return {g_x, g_weight_parts.sum(0).to(weight.scalar_type())};
}

Tensor gated_silu(const Tensor& gate, const Tensor& up) {
  const Tensor gates = gate.contiguous(), ups = up.contiguous(), y = at::empty_like(gates);
  const GatedSiLUArguments arguments{type_of(gate.scalar_type()), gate.numel(), pointer(gates), pointer(ups),
                                     pointer(y)};
  on_threads(cpu_kernels().gated_silu, arguments, arguments.count, 1);
  return y;
}

std::tuple<Tensor, Tensor> gated_silu_backward(const Tensor& g_y, const Tensor& gate, const Tensor& up) {
  const Tensor gates = gate.contiguous(), ups = up.contiguous(), g = g_y.contiguous();
  const Tensor g_gate = at::empty_like(gates), g_up = at::empty_like(ups);
  const GatedSiLUBackwardArguments arguments{type_of(gate.scalar_type()),
                                             gate.numel(),
                                             pointer(gates),
                                             pointer(ups),
                                             pointer(g),
                                             pointer(g_gate),
                                             pointer(g_up)};
  on_threads(cpu_kernels().gated_silu_backward, arguments, arguments.count, 1);
  return {g_gate, g_up};
}

}  // namespace tlcr
