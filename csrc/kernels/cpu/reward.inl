// The dense reward of every token, from a discriminator's logits or from the hidden states before its head.

#include "blocks.h"
#include "exponential.h"
#include "rows.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

// The logits of a block's tokens, a register for each class.
template <class Real, int kClasses>
struct Classes {
  Vector<Real> of[kClasses];
};

// Lane i is logit i * kClasses + kClass of the registers that hold the block's tokens one after the other.
template <int kClass, class Real>
TLCR_INLINE Vector<Real> logits_of_class(const Classes<Real, 2>& tokens) {
  return __builtin_shuffle(tokens.of[0], tokens.of[1], lane_table<Real>([](int lane) { return 2 * lane + kClass; }));
}

template <int kClass, class Real>
TLCR_INLINE Vector<Real> logits_of_class(const Classes<Real, 3>& tokens) {
  // A shuffle takes from two registers: first the lanes that are in the first two, then the rest from the third.
  constexpr int kN = kLanes<Real>;
  const auto first = [](int lane) { return 3 * lane + kClass < 2 * kN ? 3 * lane + kClass : 0; };
  const auto second = [](int lane) { return 3 * lane + kClass < 2 * kN ? lane : 3 * lane + kClass - kN; };
  const Vector<Real> of_two = __builtin_shuffle(tokens.of[0], tokens.of[1], lane_table<Real>(first));
  return __builtin_shuffle(of_two, tokens.of[2], lane_table<Real>(second));
}

template <class Real, int kClasses, class Element, class Block>
TLCR_INLINE Classes<Real, kClasses> read_logits(Block block, const Element* row) {
  Classes<Real, kClasses> tokens;
  for (int i = 0; i < kClasses; ++i) tokens.of[i] = block.template read<kClasses>(row, i);
  if constexpr (kClasses == 2)
    return {logits_of_class<0>(tokens), logits_of_class<1>(tokens)};
  else
    return {logits_of_class<0>(tokens), logits_of_class<1>(tokens), logits_of_class<2>(tokens)};
}

// p_last - p_first. A logit of +inf gives NaN as in a softmax; a logit of -inf gives its class probability 0.
template <class Real>
TLCR_INLINE Vector<Real> confidence(const Classes<Real, 2>& x, Real inverse_temperature) {
  const Vector<Real> largest = max(x.of[0], x.of[1]);
  const Vector<Real> difference = ((x.of[1] - largest) - (x.of[0] - largest)) * inverse_temperature;
  // tanh(difference / 2), which keeps its sign and its digits where the classes are almost equal.
  const Vector<Real> negative = difference > 0 ? -difference : difference;
  const Vector<Real> y = exponentials<Real>(negative).expm1;
  const Vector<Real> size = y / (y + 2);
  return difference > 0 ? -size : size;
}

template <class Real>
TLCR_INLINE Vector<Real> confidence(const Classes<Real, 3>& x, Real inverse_temperature) {
  const Vector<Real> largest = max(max(x.of[0], x.of[1]), x.of[2]);
  const auto weight = [&](int i) { return exponentials<Real>((x.of[i] - largest) * inverse_temperature).exp; };
  const Vector<Real> first = weight(0), last = weight(2);
  return (last - first) / (first + weight(1) + last);
}

// What a row's rewards are computed from, beside the logits.
template <class Real>
struct RewardRow {
  const uint8_t* mask;
  const Real* kl;  // null where its weight is 0
  Real* rewards;
  Real inverse_temperature, scale, clip, kl_coef, band;
  bool discrete;

  template <class Arguments>
  RewardRow(const Arguments& a, int64_t row)
      : mask(a.mask + row * a.length),
        kl(a.options.kl_coef == 0 ? nullptr : static_cast<const Real*>(a.kl) + row * a.length),
        rewards(static_cast<Real*>(a.rewards) + row * a.length),
        inverse_temperature(1 / a.options.temperature),
        scale(a.options.scale),
        clip(a.options.clip),
        kl_coef(a.options.kl_coef),
        band(a.options.band),
        discrete(a.options.discrete) {}

  template <class Block, int kClasses>
  TLCR_INLINE void write(Block block, const Classes<Real, kClasses>& logits) const {
    Vector<Real> reward = confidence(logits, inverse_temperature);
    const Vector<Real> zero = {}, one = splat(Real(1)), bound = splat(clip);
    if (discrete) {
      const Vector<Real> undecided = reward == reward ? zero : reward;  // NaN stays NaN
      reward = reward > band ? one : reward < -band ? -one : undecided;
    }
    reward *= scale;
    reward = reward > bound ? bound : reward < -bound ? -bound : reward;
    if (kl != nullptr) reward -= kl_coef * block.read(kl);
    block.write(rewards, block.counts(mask) ? reward : zero);
  }

  // Adds the reward of the whole answer at the last counted token, if there is one.
  TLCR_INLINE void add_terminal(const void* terminal, int64_t row, int64_t length) const {
    if (terminal == nullptr) return;
    int64_t last = length - 1;
    while (last >= 0 && mask[last] == 0) --last;
    if (last >= 0) rewards[last] += static_cast<const Real*>(terminal)[row];
  }
};

template <class Element, int kClasses>
void reward_of(const RewardArguments& a, int64_t begin, int64_t end) {
  using Real = Arithmetic<Element>;
  for (int64_t b = begin; b < end; ++b) {
    const Element* logits = static_cast<const Element*>(a.logits) + b * a.length * kClasses;
    const RewardRow<Real> row(a, b);
    for_each_block<Real>(0, a.length,
                         [&](auto block) { row.write(block, read_logits<Real, kClasses>(block, logits)); });
    row.add_terminal(a.terminal, b, a.length);
  }
}

// The logits of one token.
template <class Element, int kClasses>
struct Head {
  using Real = Arithmetic<Element>;
  int64_t width;
  const Real *weight, *bias;  // bias may be null

  TLCR_INLINE void logits(const Element* hidden, Real (&result)[kClasses]) const {
    constexpr int kAtOnce = 4;  // sums for each class, so that an addition need not wait for the one before
    Vector<Real> sums[kClasses][kAtOnce] = {};
    int64_t h = 0;
    for (; h + kAtOnce * kLanes<Real> <= width; h += kAtOnce * kLanes<Real>) {
      for (int i = 0; i < kAtOnce; ++i) add(WholeBlock<Real>{h + i * kLanes<Real>}, hidden, sums, i);
    }
    for_each_block<Real>(h, width, [&](auto block) { add(block, hidden, sums, 0); });
    for (int c = 0; c < kClasses; ++c) {
      WideSum sum;
      for (int i = 0; i < kAtOnce; ++i) sum.add(sums[c][i]);
      result[c] = sum.total() + (bias == nullptr ? 0 : bias[c]);
    }
  }

  template <class Block>
  TLCR_INLINE void add(Block block, const Element* hidden, Vector<Real> (&sums)[kClasses][4], int i) const {
    const Vector<Real> x = block.read(hidden);
    for (int c = 0; c < kClasses; ++c) sums[c][i] += x * block.read(weight + c * width);
  }
};

template <class Element, int kClasses>
void hidden_reward_of(const HiddenRewardArguments& a, int64_t begin, int64_t end) {
  using Real = Arithmetic<Element>;
  const Head<Element, kClasses> head{a.width, static_cast<const Real*>(a.weight), static_cast<const Real*>(a.bias)};
  for (int64_t b = begin; b < end; ++b) {
    const RewardRow<Real> row(a, b);
    for_each_block<Real>(0, a.length, [&](auto block) {
      Real lanes[kClasses][kLanes<Real>] = {};
      for (int lane = 0; lane < kLanes<Real> && block.begin + lane < a.length; ++lane) {
        if (row.mask[block.begin + lane] == 0) continue;
        Real logits[kClasses];
        head.logits(row_of<Element>(a.hidden, b * a.length + block.begin + lane), logits);
        for (int c = 0; c < kClasses; ++c) lanes[c][lane] = logits[c];
      }
      Classes<Real, kClasses> logits;
      for (int c = 0; c < kClasses; ++c) logits.of[c] = load(lanes[c]);
      row.write(block, logits);
    });
    row.add_terminal(a.terminal, b, a.length);
  }
}

template <class Element>
void reward_of_classes(const RewardArguments& a, int64_t begin, int64_t end) {
  a.classes == 2 ? reward_of<Element, 2>(a, begin, end) : reward_of<Element, 3>(a, begin, end);
}

void reward(const RewardArguments& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto element) { reward_of_classes<decltype(element)>(a, begin, end); });
}

template <class Element>
void hidden_reward_of_classes(const HiddenRewardArguments& a, int64_t begin, int64_t end) {
  a.classes == 2 ? hidden_reward_of<Element, 2>(a, begin, end) : hidden_reward_of<Element, 3>(a, begin, end);
}

void hidden_reward(const HiddenRewardArguments& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto element) { hidden_reward_of_classes<decltype(element)>(a, begin, end); });
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
