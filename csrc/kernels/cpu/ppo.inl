// The clipped losses of PPO: the sums of each row, then the sums of all rows in their order, and every token's
// gradients.

#include "blocks.h"
#include "exponential.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

constexpr double kLogRatioMax = 40;  // as in tlcr/ops/ppo.py

// The tensors of one row and the options, which both passes need. A token's losses, and whether they were clipped, are
// computed only here.
template <class Real>
struct PPORow {
  struct Policy {
    Vector<Real> log_ratio, ratio, ratio_less_one, loss;
    Mask<Real> is_clipped;
    Vector<Real> slope;  // of the loss in logprobs
  };
  struct Value {
    Vector<Real> squared_error;
    Mask<Real> is_near;  // the value near the old one has the larger error
    Vector<Real> slope;  // of half the squared error in values
  };

  const Real *logprobs, *old_logprobs, *advantages;
  const Real *values, *old_values, *returns;  // null as in the arguments
  const uint8_t* mask;
  Real least_ratio, greatest_ratio, dual_clip, value_clip;

  template <class Arguments>
  PPORow(const Arguments& a, int64_t row)
      : logprobs(row_at(a.logprobs, row, a.length)),
        old_logprobs(row_at(a.old_logprobs, row, a.length)),
        advantages(row_at(a.advantages, row, a.length)),
        values(row_at(a.values, row, a.length)),
        old_values(row_at(a.old_values, row, a.length)),
        returns(row_at(a.returns, row, a.length)),
        mask(a.mask + row * a.length),
        least_ratio(1 - a.options.clip),
        greatest_ratio(1 + a.options.clip_high),
        dual_clip(a.options.dual_clip),
        value_clip(a.options.value_clip) {}

  static TLCR_INLINE const Real* row_at(const void* data, int64_t row, int64_t length) {
    return data == nullptr ? nullptr : static_cast<const Real*>(data) + row * length;
  }

  // x where it counts, else 0.
  template <class Block>
  static TLCR_INLINE Vector<Real> read(Block block, const Real* x, Mask<Real> counts) {
    return counts ? block.read(x) : Vector<Real>{};
  }

  template <class Block>
  TLCR_INLINE Policy policy(Block block, Mask<Real> counts) const {
    const Vector<Real> zero = {}, cap = splat(Real(kLogRatioMax));
    const Vector<Real> difference = read(block, logprobs, counts) - read(block, old_logprobs, counts);
    const Vector<Real> log_ratio = difference > cap ? cap : difference;
    const auto [ratio, ratio_less_one] = exponentials<Real>(log_ratio);
    const Vector<Real> least = splat(least_ratio), greatest = splat(greatest_ratio);
    const Vector<Real> near_one = ratio < least ? least : ratio > greatest ? greatest : ratio;
    const Vector<Real> advantage = read(block, advantages, counts);
    const Vector<Real> unclipped = -advantage * ratio, clipped = -advantage * near_one;
    // A clipped ratio is outside its bounds, so its slope is 0. So is the slope of a ratio whose logarithm was capped.
    const Mask<Real> is_clipped = clipped > unclipped;
    Vector<Real> loss = is_clipped ? clipped : unclipped;
    Vector<Real> slope = is_clipped | ~(difference <= cap) ? zero : unclipped;
    if (dual_clip < Limits<Real>::infinity) {
      const Vector<Real> bound = -dual_clip * advantage;
      const Mask<Real> is_bounded = (advantage < 0) & (loss > bound);
      loss = is_bounded ? bound : loss;
      slope = is_bounded ? zero : slope;
    }
    return {log_ratio, ratio, ratio_less_one, loss, is_clipped, slope};
  }

  template <class Block>
  TLCR_INLINE Value value(Block block, Mask<Real> counts) const {
    const Vector<Real> zero = {};
    const Vector<Real> value = read(block, values, counts), target = read(block, returns, counts);
    const Vector<Real> error = value - target, squared_error = error * error;
    if (!(value_clip < Limits<Real>::infinity)) return {squared_error, Mask<Real>{}, error};
    const Vector<Real> old_value = read(block, old_values, counts);
    const Vector<Real> move = value - old_value, bound = splat(value_clip);
    const Vector<Real> bounded_move = move < -bound ? -bound : move > bound ? bound : move;
    const Vector<Real> near_error = (old_value + bounded_move) - target, near_squared_error = near_error * near_error;
    // A move within the bounds is not clipped, even if old + (new - old) rounds to another number than new.
    const Mask<Real> is_near = (near_squared_error > squared_error) & ((move < -bound) | (move > bound));
    return {is_near ? near_squared_error : squared_error, is_near, is_near ? zero : error};
  }
};

// A count kept lane by lane.
template <class Real>
struct LaneCount {
  Mask<Real> lanes = {};

  TLCR_INLINE void add(Mask<Real> mask) { lanes -= mask; }
  TLCR_INLINE double total() const {
    int64_t result = 0;
    for (int lane = 0; lane < kLanes<Real>; ++lane) result += lanes[lane];
    return result;
  }
};

template <class Real>
TLCR_INLINE Real largest_or_nan(Vector<Real> x) {
  Real result = x[0];
  for (int lane = 1; lane < kLanes<Real>; ++lane) result = x[lane] > result || x[lane] != x[lane] ? x[lane] : result;
  return result;
}

template <class Real>
void ppo_row(const PPOArguments& a, int64_t b) {
  const PPORow<Real> row(a, b);
  const Real *entropy = row.row_at(a.entropy, b, a.length), *kl = row.row_at(a.kl, b, a.length);
  WideSum policy_sum, value_sum, entropy_sum, kl_sum, approx_kl_sum;
  LaneCount<Real> counted, clipped, value_clipped;
  Vector<Real> largest_ratio = {};
  for_each_stretch<Real>(0, a.length, [&](int64_t begin, int64_t end) {
    Vector<Real> policy = {}, value = {}, entropies = {}, kls = {}, approx_kl = {};
    for_each_block<Real>(begin, end, [&](auto block) {
      const Mask<Real> counts = block.counts(row.mask);
      const auto of_policy = row.policy(block, counts);
      policy += of_policy.loss;
      approx_kl += of_policy.ratio_less_one - of_policy.log_ratio;
      counted.add(counts);
      clipped.add(of_policy.is_clipped);
      // A NaN is taken as larger than every number.
      const Vector<Real> ratio = counts ? of_policy.ratio : Vector<Real>{};
      largest_ratio = ((ratio > largest_ratio) | (ratio != ratio)) ? ratio : largest_ratio;
      if (row.values != nullptr) {
        const auto of_value = row.value(block, counts);
        value += of_value.squared_error;
        value_clipped.add(of_value.is_near);
      }
      if (entropy != nullptr) entropies += row.read(block, entropy, counts);
      if (kl != nullptr) kls += row.read(block, kl, counts);
    });
    policy_sum.add(policy);
    value_sum.add(value);
    entropy_sum.add(entropies);
    kl_sum.add(kls);
    approx_kl_sum.add(approx_kl);
  });
  Real* sums = static_cast<Real*>(a.row_sums) + b * (kPPOStats + 1);
  sums[kLoss] = 0;  // computed from the others
  sums[kPolicy] = policy_sum.total();
  sums[kValue] = value_sum.total();
  sums[kEntropy] = entropy_sum.total();
  sums[kKL] = kl_sum.total();
  sums[kClipFraction] = clipped.total();
  sums[kValueClipFraction] = value_clipped.total();
  sums[kApproxKL] = approx_kl_sum.total();
  sums[kRatioMax] = largest_or_nan<Real>(largest_ratio);
  sums[kPPOStats] = counted.total();
}

// The number of counted tokens of each row, where the weights have to be known before the sums.
template <class Real>
void ppo_count_row(const PPOArguments& a, int64_t b) {
  const uint8_t* mask = a.mask + b * a.length;
  int64_t tokens = 0;
  for (int64_t t = 0; t < a.length; ++t) tokens += mask[t] != 0;
  static_cast<Real*>(a.row_sums)[b * (kPPOStats + 1) + kPPOStats] = tokens;
}

// Of the rows whose tokens are counted: what a row's sums are divided by to be added up, ...
template <class Real>
double row_divisor(const PPOArguments& a, int64_t b) {
  const double tokens = static_cast<const Real*>(a.row_sums)[b * (kPPOStats + 1) + kPPOStats];
  return a.options.per_sequence && tokens > 0 ? tokens : 1;
}

// ... and what the total is divided by to be a mean.
template <class Real>
double denominator_of(const PPOArguments& a) {
  if (a.denominator != nullptr) {
    const double given = *static_cast<const Real*>(a.denominator);
    return given == 0 ? 1 : given;
  }
  if (a.options.denominator != 0) return a.options.denominator;
  const Real* row_sums = static_cast<const Real*>(a.row_sums);
  double count = 0;
  for (int64_t b = 0; b < a.batch; ++b, row_sums += kPPOStats + 1) {
    const double tokens = row_sums[kPPOStats];
    count += a.options.per_sequence ? tokens > 0 : tokens;
  }
  return count > 0 ? count : 1;
}

template <class Real>
void ppo_weigh_of(const PPOArguments& a) {
  const double denominator = denominator_of<Real>(a);
  Real* weights = static_cast<Real*>(a.row_weights);
  for (int64_t b = 0; b < a.batch; ++b) weights[b] = 1 / (row_divisor<Real>(a, b) * denominator);
}

template <class Real>
void ppo_finish_of(const PPOArguments& a) {
  const PPOOptions& options = a.options;
  const Real* row_sums = static_cast<const Real*>(a.row_sums);
  double sums[kPPOStats] = {};
  for (int64_t b = 0; b < a.batch; ++b, row_sums += kPPOStats + 1) {
    const double divisor = row_divisor<Real>(a, b);
    for (int stat = kPolicy; stat < kRatioMax; ++stat) sums[stat] += row_sums[stat] / divisor;
    const double ratio = row_sums[kRatioMax];
    if (ratio > sums[kRatioMax] || ratio != ratio) sums[kRatioMax] = ratio;
  }
  const double denominator = denominator_of<Real>(a);
  for (int stat = kPolicy; stat < kRatioMax; ++stat) sums[stat] /= denominator;
  sums[kValue] /= 2;
  // A term whose coefficient is 0 is left out: 0 times an infinite term would be NaN.
  sums[kLoss] = sums[kPolicy];
  if (options.value_coef != 0) sums[kLoss] += options.value_coef * sums[kValue];
  if (options.entropy_coef != 0) sums[kLoss] -= options.entropy_coef * sums[kEntropy];
  if (options.kl_coef != 0) sums[kLoss] += options.kl_coef * sums[kKL];
  for (int stat = 0; stat < kPPOStats; ++stat) static_cast<Real*>(a.stats)[stat] = sums[stat];
}

template <class Real>
void ppo_backward_row(const PPOBackwardArguments& a, int64_t b) {
  const PPORow<Real> row(a, b);
  const double weight = double(*static_cast<const Real*>(a.g_loss)) * static_cast<const Real*>(a.row_weights)[b];
  const auto row_out = [&](void* data) { return data == nullptr ? nullptr : static_cast<Real*>(data) + b * a.length; };
  Real *const g_logprobs = row_out(a.g_logprobs), *const g_values = row_out(a.g_values);
  Real *const g_entropy = row_out(a.g_entropy), *const g_kl = row_out(a.g_kl);
  // A term whose coefficient is 0 has a gradient of exactly 0, whatever its slope is.
  const bool has_value = a.options.value_coef != 0 && a.values != nullptr;
  const Real of_policy = weight, of_value = weight * a.options.value_coef;
  const Vector<Real> of_entropy = splat(Real(a.options.entropy_coef == 0 ? 0 : -weight * a.options.entropy_coef));
  const Vector<Real> of_kl = splat(Real(a.options.kl_coef == 0 ? 0 : weight * a.options.kl_coef));
  const Vector<Real> zero = {};
  for_each_block<Real>(0, a.length, [&](auto block) {
    const Mask<Real> counts = block.counts(row.mask);
    if (g_logprobs != nullptr) {
      block.write(g_logprobs, counts ? of_policy * row.policy(block, counts).slope : zero);
    }
    if (g_values != nullptr) {
      block.write(g_values, has_value && counts ? of_value * row.value(block, counts).slope : zero);
    }
    if (g_entropy != nullptr) block.write(g_entropy, counts ? of_entropy : zero);
    if (g_kl != nullptr) block.write(g_kl, counts ? of_kl : zero);
  });
}

void ppo(const PPOArguments& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) a.type == Type::kDouble ? ppo_row<double>(a, b) : ppo_row<float>(a, b);
}

void ppo_count(const PPOArguments& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    a.type == Type::kDouble ? ppo_count_row<double>(a, b) : ppo_count_row<float>(a, b);
  }
}

void ppo_weigh(const PPOArguments& a) { a.type == Type::kDouble ? ppo_weigh_of<double>(a) : ppo_weigh_of<float>(a); }

void ppo_finish(const PPOArguments& a) { a.type == Type::kDouble ? ppo_finish_of<double>(a) : ppo_finish_of<float>(a); }

void ppo_backward(const PPOBackwardArguments& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    a.type == Type::kDouble ? ppo_backward_row<double>(a, b) : ppo_backward_row<float>(a, b);
  }
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
