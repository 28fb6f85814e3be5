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
  torch::stable::parallel_for(0, first_chunks.back(), kGrain / kChunk, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_chunks.begin(), first_chunks.end(), begin) - first_chunks.begin() - 1;
    for (; begin < end; begin = first_chunks[++i]) {
      const int64_t chunks_before = first_chunks[i];
      const int64_t last = (std::min(end, first_chunks[i + 1]) - chunks_before) * kChunk;
      cpu::kernels().adamw(tensors[i], (begin - chunks_before) * kChunk, std::min(last, tensors[i].count));
    }
  });
}

}  // namespace

void adamw_step(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                const std::vector<Tensor>& remainders, double learning_rate, double beta1, double beta2, double eps,
                double weight_decay, int64_t step) {
  AdamWArguments arguments{};
  arguments.decay = 1 - learning_rate * weight_decay;
  arguments.beta1 = beta1;
  arguments.beta2 = beta2;
  arguments.step_size = learning_rate / (1 - std::pow(beta1, step));
  arguments.correction = std::sqrt(1 - std::pow(beta2, step));
  arguments.eps = eps;
  std::vector<AdamWArguments> together;
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (parameters[i].numel() == 0) continue;
    // Tensors with gaps in memory are copied, and their copies do not wait for those of the others.
    const InPlace weights(parameters[i]), means(exp_avgs[i]), squares(exp_avg_sqs[i]), rests(remainders[i]);
    const Tensor gradients = dense(grads[i]);
    arguments.count = parameters[i].numel();
    arguments.weights = static_cast<uint16_t*>(weights.data());
    arguments.remainders = static_cast<int16_t*>(rests.data());
    arguments.exp_avg = static_cast<float*>(means.data());
    arguments.exp_avg_sq = static_cast<float*>(squares.data());
    arguments.gradients = pointer(gradients);
    const bool copied = weights.copied() || means.copied() || squares.copied() || rests.copied();
    if (copied || gradients.get() != grads[i].get()) {
      adamw_on_threads({arguments});
    } else {
      together.push_back(arguments);
    }
  }
  adamw_on_threads(together);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Tensor rows = dense(x), weights = dense(weight), y = empty_as(rows);
  const Tensor scales = empty({rows.numel() / std::max<int64_t>(1, weight.numel())}, real_dtype(x), x);
  const RMSNormArguments arguments{type_of(x), scales.numel(), weight.numel(), pointer(rows), pointer(weights),
                                   eps,        pointer(y),     pointer(scales)};
  on_threads(cpu::kernels().rms_norm, arguments, arguments.rows, arguments.width);
  return {y, scales};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& g_y, const Tensor& x, const Tensor& weight,
                                             const Tensor& scales) {
  const Tensor rows = dense(x), weights = dense(weight), g = dense(g_y), g_x = empty_as(rows);
  const int64_t parts = (scales.numel() + kNormRows - 1) / kNormRows;
  const Tensor g_weight_parts = empty({parts, weight.numel()}, dtype_of(scales), scales);
  const RMSNormBackwardArguments arguments{type_of(x),      scales.numel(),   weight.numel(),
                                           pointer(rows),   pointer(weights), pointer(g),
                                           pointer(scales), pointer(g_x),     pointer(g_weight_parts)};
  on_threads(cpu::kernels().rms_norm_backward, arguments, parts, kNormRows * arguments.width);
  return {g_x, cast(torch::stable::sum(g_weight_parts, {{0}}), dtype_of(weight))};
}

Tensor gated_silu(const Tensor& gate, const Tensor& up) {
  const Tensor gates = dense(gate), ups = dense(up), y = empty_as(gates);
  const GatedSiLUArguments arguments{type_of(gate), gate.numel(), pointer(gates), pointer(ups), pointer(y)};
  on_threads(cpu::kernels().gated_silu, arguments, arguments.count, 1);
  return y;
}

std::tuple<Tensor, Tensor> gated_silu_backward(const Tensor& g_y, const Tensor& gate, const Tensor& up) {
  const Tensor gates = dense(gate), ups = dense(up), g = dense(g_y);
  const Tensor g_gate = empty_as(gates), g_up = empty_as(ups);
  const GatedSiLUBackwardArguments arguments{type_of(gate), gate.numel(),    pointer(gates), pointer(ups),
                                             pointer(g),    pointer(g_gate), pointer(g_up)};
  on_threads(cpu::kernels().gated_silu_backward, arguments, arguments.count, 1);
  return {g_gate, g_up};
}

}  // namespace tlcr
