// Registers the kernels with torch, under the schemas that the specs in tlcr/ops/ define. This file has the ops on (B,
// T) tensors, scoring.cpp has scoring, and training.cpp has the ops that update a model. The Python functions check the
// arguments, and tlcr/ops/_extension.py these signatures against the schemas.
//
// Everything goes through torch's stable ABI (docs/kernels.md, "One library"), whose functions serve every torch from
// TORCH_TARGET_VERSION on.
#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

#include "facts.h"
#include "run.h"
#include "scoring.h"
#include "training.h"

namespace tlcr {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What fused_reward and reward_from_hidden share: the tensors of a reward in the kernels' dtypes, and its options.
struct Reward {
  Tensor mask, rewards;
  MaybeTensor kl, terminal;
  RewardOptions options;

  Reward(const Tensor& mask, const MaybeTensor& kl, double kl_coef, const MaybeTensor& terminal, double temperature,
         double scale, std::optional<double> clip, bool discrete, double band, Dtype real)
      : mask(dense(mask)),
        rewards(empty(mask.sizes(), real, mask)),
        kl(kl_coef != 0 ? dense(kl, real) : MaybeTensor()),
        terminal(dense(terminal, real)),
        options{temperature, scale, clip.value_or(kInfinity), kl_coef, band, discrete} {}

  template <typename Arguments>
  void fill(Arguments& arguments) const {
    arguments.batch = mask.size(0);
    arguments.length = mask.size(1);
    arguments.mask = bytes(mask);
    arguments.kl = pointer(kl);
    arguments.terminal = pointer(terminal);
    arguments.options = options;
    arguments.rewards = pointer(rewards);
  }
};

Tensor fused_reward(const Tensor& logits, const Tensor& mask, const MaybeTensor& kl, double kl_coef,
                    const MaybeTensor& terminal, double temperature, double scale, std::optional<double> clip,
                    bool discrete, double band) {
  const Reward reward(mask, kl, kl_coef, terminal, temperature, scale, clip, discrete, band, real_dtype(logits));
  const Tensor logits_BTC = dense(readable(logits));
  RewardArguments arguments{};
  arguments.type = type_of(logits_BTC);
  arguments.classes = logits.size(2);
  arguments.logits = pointer(logits_BTC);
  reward.fill(arguments);
  on_threads(cpu::kernels().reward, arguments, arguments.batch, arguments.length);
  return reward.rewards;
}

Tensor reward_from_hidden(const Tensor& hidden, const Tensor& weight, const Tensor& mask, const MaybeTensor& bias,
                          const MaybeTensor& kl, double kl_coef, const MaybeTensor& terminal, double temperature,
                          double scale, std::optional<double> clip, bool discrete, double band) {
  const Dtype real = real_dtype(hidden, weight, bias);
  const Reward reward(mask, kl, kl_coef, terminal, temperature, scale, clip, discrete, band, real);
  // Kernels read half precision and the type of the arithmetic.
  const Tensor hidden_BTH = real == kDouble ? cast(hidden, real) : readable(hidden);
  const RowsOf rows(hidden_BTH);
  const Tensor weight_CH = dense(weight, real);
  const MaybeTensor bias_C = dense(bias, real);
  HiddenRewardArguments arguments{};
  arguments.type = type_of(hidden_BTH);
  arguments.width = hidden.size(2);
  arguments.classes = weight.size(0);
  arguments.hidden = rows.rows();
  arguments.weight = pointer(weight_CH);
  arguments.bias = pointer(bias_C);
  reward.fill(arguments);
  if (mask.numel() != 0) run_hidden_reward(hidden, arguments);
  return reward.rewards;
}

// Python checks them with a message of its own; compiled code comes here without.
void check_cumulative_lengths(const Tensor& cu_seqlens, int64_t tokens) {
  const int32_t* offset = static_cast<const int32_t*>(pointer(cu_seqlens));
  const int64_t count = cu_seqlens.numel();
  require(count > 0 && offset[0] == 0 && std::is_sorted(offset, offset + count) && offset[count - 1] <= tokens,
          "tlcr: fused_gae needs cu_seqlens that begin with 0, never descend and end at the number of tokens or "
          "before");
}

// Which of the packed positions count: those of a sequence, less what the mask leaves out.
std::vector<uint8_t> counted(const MaybeTensor& mask, int64_t positions, int64_t end) {
  std::vector<uint8_t> counts(static_cast<std::size_t>(positions));
  if (mask.has_value()) {
    std::copy_n(bytes(*mask), end, counts.begin());
  } else {
    std::fill_n(counts.begin(), end, uint8_t{1});
  }
  return counts;
}

std::tuple<Tensor, Tensor> fused_gae(const Tensor& rewards, const Tensor& values, const MaybeTensor& mask, double gamma,
                                     double lam, bool whiten, const MaybeTensor& cu_seqlens) {
  const Dtype real = real_dtype(rewards, values);
  const Tensor dense_rewards = dense(rewards, real), dense_values = dense(values, real);
  const MaybeTensor dense_mask = dense(mask, kBool), dense_cu_seqlens = dense(cu_seqlens, kInt);
  const bool packed = dense_cu_seqlens.has_value();
  if (packed) check_cumulative_lengths(*dense_cu_seqlens, rewards.numel());
  // The kernel also writes the positions behind the sequences, if there are any sequences.
  const auto result = packed && dense_cu_seqlens->numel() == 1 ? zeros : empty;
  const Tensor advantages = result(rewards.sizes(), real, rewards), returns = result(rewards.sizes(), real, rewards);
  if (rewards.numel() == 0) return {advantages, returns};

  GaeArguments arguments{};
  arguments.type = type_of(real);
  arguments.sequences = packed ? dense_cu_seqlens->numel() - 1 : rewards.size(0);
  arguments.length = rewards.size(-1);
  arguments.cu_seqlens = static_cast<const int32_t*>(pointer(dense_cu_seqlens));
  arguments.rewards = pointer(dense_rewards);
  arguments.values = pointer(dense_values);
  arguments.mask = dense_mask.has_value() ? bytes(*dense_mask) : nullptr;
  arguments.gamma = gamma;
  arguments.lam = lam;
  arguments.advantages = pointer(advantages);
  arguments.returns = pointer(returns);
  const int64_t width = packed ? arguments.length / std::max<int64_t>(1, arguments.sequences) : arguments.length;
  on_threads(cpu::kernels().gae, arguments, arguments.sequences, width);
  if (!whiten) return {advantages, returns};

  std::vector<uint8_t> counts;
  if (packed) counts = counted(dense_mask, rewards.numel(), arguments.cu_seqlens[arguments.sequences]);
  const WhitenArguments whitening{type_of(real), rewards.numel(), packed ? counts.data() : arguments.mask,
                                  pointer(advantages)};
  cpu::kernels().whiten(whitening);
  return {advantages, returns};
}

// What both passes of ppo_loss read, in the arithmetic's dtype.
struct PPOInputs {
  Dtype real;
  Tensor logprobs, old_logprobs, advantages, mask;
  MaybeTensor values, old_values, returns;
  PPOOptions options;

  PPOInputs(Dtype real, const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
            const Tensor& mask, const MaybeTensor& values, const MaybeTensor& old_values, const MaybeTensor& returns,
            const PPOOptions& options)
      : real(real),
        logprobs(dense(logprobs, real)),
        old_logprobs(dense(old_logprobs, real)),
        advantages(dense(advantages, real)),
        mask(dense(mask)),
        values(dense(values, real)),
        old_values(options.value_clip < kInfinity ? dense(old_values, real) : MaybeTensor()),
        returns(dense(returns, real)),
        options(options) {}

  template <typename Arguments>
  void fill(Arguments& arguments) const {
    arguments.type = type_of(real);
    arguments.batch = mask.size(0);
    arguments.length = mask.size(1);
    arguments.logprobs = pointer(logprobs);
    arguments.old_logprobs = pointer(old_logprobs);
    arguments.advantages = pointer(advantages);
    arguments.values = pointer(values);
    arguments.old_values = pointer(old_values);
    arguments.returns = pointer(returns);
    arguments.mask = bytes(mask);
    arguments.options = options;
  }
};

// Numbers of the arithmetic's dtype for the time of a call: cheaper than a tensor, and wide enough for either dtype.
using Scratch = std::vector<double>;

// The forward pass: the loss and the statistics, kPPOStats numbers. `run` fills row_sums and row_weights.
template <typename Run>
void ppo_forward(Dtype real, void* row_weights, void* stats, const Tensor& logprobs, const Tensor& old_logprobs,
                 const Tensor& advantages, const Tensor& mask, double clip, double clip_high,
                 std::optional<double> dual_clip, const MaybeTensor& values, const MaybeTensor& old_values,
                 const MaybeTensor& returns, std::optional<double> value_clip, double value_coef,
                 const MaybeTensor& entropy, double entropy_coef, const MaybeTensor& kl, double kl_coef,
                 bool per_sequence, std::optional<double> denominator, const MaybeTensor& denominator_tensor,
                 const Run& run) {
  const PPOOptions options{
      clip,    clip_high,    dual_clip.value_or(kInfinity), value_clip.value_or(kInfinity), value_coef, entropy_coef,
      kl_coef, per_sequence, denominator.value_or(0)};
  const PPOInputs inputs(real, logprobs, old_logprobs, advantages, mask, values, old_values, returns, options);
  const MaybeTensor entropy_BT = dense(entropy, real), kl_BT = dense(kl, real), count = dense(denominator_tensor, real);
  Scratch row_sums(mask.size(0) * (kPPOStats + 1));
  PPOArguments arguments{};
  inputs.fill(arguments);
  arguments.entropy = pointer(entropy_BT);
  arguments.kl = pointer(kl_BT);
  arguments.denominator = pointer(count);
  arguments.row_sums = row_sums.data();
  arguments.row_weights = row_weights;
  arguments.stats = stats;
  run(inputs, arguments);
  cpu::kernels().ppo_finish(arguments);
}

// One of the numbers, as a tensor of its own.
Tensor scalar(const void* numbers, int at, Dtype real, const Tensor& like) {
  Tensor number = empty({}, real, like);
  std::memcpy(pointer(number), advanced(numbers, at, real), static_cast<std::size_t>(element_size(real)));
  return number;
}

std::tuple<Tensor, Tensor, Tensor> ppo_loss(const Tensor& logprobs, const Tensor& old_logprobs,
                                            const Tensor& advantages, const Tensor& mask, double clip, double clip_high,
                                            std::optional<double> dual_clip, const MaybeTensor& values,
                                            const MaybeTensor& old_values, const MaybeTensor& returns,
                                            std::optional<double> value_clip, double value_coef,
                                            const MaybeTensor& entropy, double entropy_coef, const MaybeTensor& kl,
                                            double kl_coef, bool per_sequence, std::optional<double> denominator,
                                            const MaybeTensor& denominator_tensor) {
  const Dtype real = real_dtype(logprobs, old_logprobs, advantages, values, old_values, returns, entropy, kl);
  const Tensor row_weights = empty({mask.size(0)}, real, logprobs), stats = empty({kPPOStats}, real, logprobs);
  const auto run = [](const PPOInputs&, const PPOArguments& arguments) {
    on_threads(cpu::kernels().ppo, arguments, arguments.batch, arguments.length);
    cpu::kernels().ppo_weigh(arguments);
  };
  ppo_forward(real, pointer(row_weights), pointer(stats), logprobs, old_logprobs, advantages, mask, clip, clip_high,
              dual_clip, values, old_values, returns, value_clip, value_coef, entropy, entropy_coef, kl, kl_coef,
              per_sequence, denominator, denominator_tensor, run);
  return {scalar(pointer(stats), kLoss, real, logprobs), stats, row_weights};
}

// For the gradient of a (B, T) tensor; one that is not wanted has no elements.
Tensor gradient(bool wanted, const Tensor& mask, Dtype real) {
  return wanted ? empty(mask.sizes(), real, mask) : empty({0}, real, mask);
}

using PPOScalars = std::array<Tensor, kPPOStats>;
using PPOGradients = std::array<Tensor, 4>;
using PPOWithGradients = decltype(std::tuple_cat(std::declval<PPOScalars>(), std::declval<PPOGradients>()));

// The fields of tlcr.ops.PPOLoss, and the gradients of the loss. Each statistic is a tensor of its own, because taking
// one tensor apart in Python costs the host more. The weights come first, so that a row's sums and its gradients are
// computed one after the other, while the row is near.
PPOWithGradients ppo_loss_with_gradients(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& mask, double clip,
    double clip_high, std::optional<double> dual_clip, const MaybeTensor& values, const MaybeTensor& old_values,
    const MaybeTensor& returns, std::optional<double> value_clip, double value_coef, const MaybeTensor& entropy,
    double entropy_coef, const MaybeTensor& kl, double kl_coef, bool per_sequence, std::optional<double> denominator,
    const MaybeTensor& denominator_tensor, bool wants_logprobs, bool wants_values, bool wants_entropy, bool wants_kl) {
  const Dtype real = real_dtype(logprobs, old_logprobs, advantages, values, old_values, returns, entropy, kl);
  const auto wanted = [&](bool wants) { return gradient(wants, mask, real); };
  PPOGradients gradients{wanted(wants_logprobs), wanted(wants_values), wanted(wants_entropy), wanted(wants_kl)};
  const double one = 1;
  const float float_one = 1;
  const auto run = [&](const PPOInputs& inputs, const PPOArguments& arguments) {
    PPOBackwardArguments backward{};
    inputs.fill(backward);
    backward.row_weights = arguments.row_weights;
    backward.g_loss = real == kDouble ? static_cast<const void*>(&one) : &float_one;
    backward.g_logprobs = pointer(gradients[0]);
    backward.g_values = pointer(gradients[1]);
    backward.g_entropy = pointer(gradients[2]);
    backward.g_kl = pointer(gradients[3]);
    const cpu::Kernels& kernels = cpu::kernels();
    on_threads(kernels.ppo_count, arguments, arguments.batch, arguments.length);
    kernels.ppo_weigh(arguments);
    const auto both = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernels.ppo(arguments, row, row + 1);
        kernels.ppo_backward(backward, row, row + 1);
      }
    };
    on_threads(both, arguments.batch, arguments.length);
  };
  Scratch row_weights(mask.size(0)), stats(kPPOStats);
  ppo_forward(real, row_weights.data(), stats.data(), logprobs, old_logprobs, advantages, mask, clip, clip_high,
              dual_clip, values, old_values, returns, value_clip, value_coef, entropy, entropy_coef, kl, kl_coef,
              per_sequence, denominator, denominator_tensor, run);
  const auto of = [&](int stat) { return scalar(stats.data(), stat, real, logprobs); };
  PPOScalars scalars{
      of(kLoss),     of(kPolicy),  of(kValue), of(kEntropy), of(kKL), of(kClipFraction), of(kValueClipFraction),
      of(kApproxKL), of(kRatioMax)};
  return std::tuple_cat(std::move(scalars), std::move(gradients));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss_backward(
    const Tensor& g_loss, const Tensor& row_weights, const Tensor& logprobs, const Tensor& old_logprobs,
    const Tensor& advantages, const Tensor& mask, double clip, double clip_high, std::optional<double> dual_clip,
    const MaybeTensor& values, const MaybeTensor& old_values, const MaybeTensor& returns,
    std::optional<double> value_clip, double value_coef, const MaybeTensor& entropy, double entropy_coef,
    const MaybeTensor& kl, double kl_coef, bool wants_logprobs, bool wants_values, bool wants_entropy, bool wants_kl) {
  const Dtype real = dtype_of(row_weights);
  const PPOOptions options{clip,
                           clip_high,
                           dual_clip.value_or(kInfinity),
                           value_clip.value_or(kInfinity),
                           value_coef,
                           entropy_coef,
                           kl_coef,
                           /*per_sequence=*/false,
                           /*denominator=*/0};
  const PPOInputs inputs(real, logprobs, old_logprobs, advantages, mask, values, old_values, returns, options);
  const Tensor g_logprobs = gradient(wants_logprobs, mask, real), g_values = gradient(wants_values, mask, real);
  const Tensor g_entropy = gradient(wants_entropy, mask, real), g_kl = gradient(wants_kl, mask, real);
  const Tensor g = dense(g_loss, real), weights = dense(row_weights, real);
  PPOBackwardArguments arguments{};
  inputs.fill(arguments);
  arguments.row_weights = pointer(weights);
  arguments.g_loss = pointer(g);
  arguments.g_logprobs = pointer(g_logprobs);
  arguments.g_values = pointer(g_values);
  arguments.g_entropy = pointer(g_entropy);
  arguments.g_kl = pointer(g_kl);
  on_threads(cpu::kernels().ppo_backward, arguments, arguments.batch, arguments.length);
  const auto as = [](const Tensor& computed, const MaybeTensor& input) {
    return input.has_value() ? cast(computed, dtype_of(*input)) : computed;
  };
  return {as(g_logprobs, logprobs), as(g_values, values), as(g_entropy, entropy), as(g_kl, kl)};
}

STABLE_TORCH_LIBRARY_IMPL(tlcr, CPU, m) {
  implement<fused_reward>(m, "fused_reward");
  implement<reward_from_hidden>(m, "reward_from_hidden");
  implement<fused_gae>(m, "fused_gae");
  implement<score_tokens>(m, "score_tokens");
  implement<score_tokens_backward>(m, "score_tokens_backward");
  implement<score_hidden>(m, "score_hidden");
  implement<score_hidden_backward>(m, "score_hidden_backward");
  implement<ppo_loss>(m, "ppo_loss");
  implement<ppo_loss_backward>(m, "ppo_loss_backward");
  implement<ppo_loss_with_gradients>(m, "ppo_loss_with_gradients");
  implement<adamw_step>(m, "adamw_step");
  implement<rms_norm>(m, "rms_norm");
  implement<rms_norm_backward>(m, "rms_norm_backward");
  implement<gated_silu>(m, "gated_silu");
  implement<gated_silu_backward>(m, "gated_silu_backward");
}

#ifdef TLCR_CUDA
// The CUDA kernels of the other ops are Triton kernels, which tlcr/ops/_library.py registers.
STABLE_TORCH_LIBRARY_IMPL(tlcr, CUDA, m) {
  implement<reward_from_hidden>(m, "reward_from_hidden");
  implement<score_tokens>(m, "score_tokens");
  implement<score_tokens_backward>(m, "score_tokens_backward");
  implement<score_hidden>(m, "score_hidden");
  implement<score_hidden_backward>(m, "score_hidden_backward");
}
#endif

}  // namespace
}  // namespace tlcr
