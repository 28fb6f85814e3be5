#include "training.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "run.h"

namespace tlcr {

namespace {

// Weights of a chunk. The chunks of all tensors together are divided among the threads; no result depends on where they
// are cut.
constexpr int64_t kChunk = 4096;

void adamw_on_threads(const std::vector<AdamWArguments>& tensors) {
  std::vector<int64_t> first_chunks{0};  // of each tensor; the number of all chunks at the end
  for (const AdamWArguments& tensor : tensors) {
    first_chunks.push_back(first_chunks.back() + (tensor.count + kChunk - 1) / kChunk);
  }
  at::parallel_for(0, first_chunks.back(), kGrain / kChunk, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_chunks.begin(), first_chunks.end(), begin) - first_chunks.begin() - 1;
    for (; begin < end; begin = first_chunks[++i]) {
      const int64_t chunks_before = first_chunks[i];
      const int64_t last = (std::min(end, first_chunks[i + 1]) - chunks_before) * kChunk;
      cpu_kernels().adamw(tensors[i], (begin - chunks_before) * kChunk, std::min(last, tensors[i].count));
    }
  });
}

}  // namespace

void adamw_step(TensorList parameters, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                TensorList remainders, double learning_rate, double beta1, double beta2, double eps,
                double weight_decay, int64_t step) {
  AdamWArguments arguments{};
  arguments.decay = 1 - learning_rate * weight_decay;
  arguments.beta1 = beta1;
  arguments.beta2 = beta2;
  arguments.step_size = learning_rate / (1 - std::pow(beta1, step));
  arguments.correction = std::sqrt(1 - std::pow(beta2, step));
  arguments.eps = eps;
  std::vector<AdamWArguments> dense;
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (parameters[i].numel() == 0) continue;
    // Tensors with gaps in memory are copied, and their copies do not wait for those of the others.
    const InPlace weights(parameters[i]), means(exp_avgs[i]), squares(exp_avg_sqs[i]), rests(remainders[i]);
    const Tensor gradients = grads[i].contiguous();
    arguments.count = parameters[i].numel();
    arguments.weights = static_cast<uint16_t*>(weights.data());
    arguments.remainders = static_cast<int16_t*>(rests.data());
    arguments.exp_avg = static_cast<float*>(means.data());
    arguments.exp_avg_sq = static_cast<float*>(squares.data());
    arguments.gradients = pointer(gradients);
    const bool copied = weights.copied() || means.copied() || squares.copied() || rests.copied();
    if (copied || !gradients.is_same(grads[i])) {
      adamw_on_threads({arguments});
    } else {
      dense.push_back(arguments);
    }
  }
  adamw_on_threads(dense);
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
