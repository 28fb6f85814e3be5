// Generalised advantage estimation: the recurrence A_t = delta_t + gamma lam A_next, from the last token to the first.
// It is computed as a scan by doubling within each register and one multiply-add between registers. Every row is
// computed by itself, so that its result cannot depend on other rows.

#include "blocks.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

// Lane i of the result is lane i + kShift of x followed by `beyond`.
template <class Real, int kShift, class V>
TLCR_INLINE V later_lanes(V x, V beyond) {
  return __builtin_shuffle(x, beyond, lane_table<Real>([](int lane) { return lane + kShift; }));
}

// y_i = x_i + decay y_{i+1} within a register.
template <class Real, int kShift = 1>
TLCR_INLINE Vector<Real> scan(Vector<Real> y, Real decay) {
  y += decay * later_lanes<Real, kShift>(y, Vector<Real>{});
  if constexpr (2 * kShift < kLanes<Real>) return scan<Real, 2 * kShift>(y, decay * decay);
  return y;
}

// y_i = x_i + decay_i y_{i+1} within a register; decay_i becomes the product of those from lane i on.
template <class Real, int kShift = 1>
TLCR_INLINE Vector<Real> scan(Vector<Real> y, Vector<Real>& decay) {
  y += decay * later_lanes<Real, kShift>(y, Vector<Real>{});
  decay *= later_lanes<Real, kShift>(decay, splat(Real(1)));
  if constexpr (2 * kShift < kLanes<Real>) return scan<Real, 2 * kShift>(y, decay);
  return y;
}

// Each unknown lane takes the value of the first known lane after it, and becomes known if there is one.
template <class Real, int kShift = 1>
TLCR_INLINE Vector<Real> next_known(Vector<Real> x, Mask<Real>& known) {
  x = known ? x : later_lanes<Real, kShift>(x, Vector<Real>{});
  known |= later_lanes<Real, kShift>(known, Mask<Real>{});
  if constexpr (2 * kShift < kLanes<Real>) return next_known<Real, 2 * kShift>(x, known);
  return x;
}

// In every lane: the advantage and the value of the next counted token.
template <class Real>
struct Following {
  Vector<Real> advantage = {}, value = {};
};

template <class Real>
struct Gae {
  const Real *rewards, *values;
  const uint8_t* mask;  // or null
  Real *advantages, *returns;
  Real gamma, decay;          // decay is gamma * lam
  Vector<Real> decay_to_end;  // lane i: decay, once for every lane from i to the last

  explicit Gae(const GaeArguments& a)
      : rewards(static_cast<const Real*>(a.rewards)),
        values(static_cast<const Real*>(a.values)),
        mask(a.mask),
        advantages(static_cast<Real*>(a.advantages)),
        returns(static_cast<Real*>(a.returns)),
        gamma(a.gamma),
        decay(a.gamma * a.lam) {
    double power = 1;
    for (int lane = kLanes<Real> - 1; lane >= 0; --lane) decay_to_end[lane] = power *= a.gamma * a.lam;
  }

  // The tokens [begin, end) of one sequence.
  void sequence(int64_t begin, int64_t end) const {
    const int64_t part = (end - begin) % kLanes<Real>;
    Following<Real> following;
    if (part > 0) mixed_block(PartBlock<Real>{end - part, static_cast<int>(part)}, following);
    for (int64_t at = end - part - kLanes<Real>; at >= begin; at -= kLanes<Real>) {
      const WholeBlock<Real> block{at};
      if (all_are(1, at)) {
        full_block(block, following);
      } else if (all_are(0, at)) {
        block.write(advantages, Vector<Real>{});
        block.write(returns, Vector<Real>{});
      } else {
        mixed_block(block, following);
      }
    }
  }

  TLCR_INLINE bool all_are(uint8_t wanted, int64_t at) const {
    if (mask == nullptr) return wanted == 1;
    uint8_t bytes[kLanes<Real>];
    __builtin_memset(bytes, wanted, sizeof(bytes));
    return __builtin_memcmp(mask + at, bytes, sizeof(bytes)) == 0;
  }

  // A block in which every token counts.
  TLCR_INLINE void full_block(WholeBlock<Real> block, Following<Real>& following) const {
    const Vector<Real> r = block.read(rewards), v = block.read(values);
    const Vector<Real> delta = r + gamma * later_lanes<Real, 1>(v, following.value) - v;
    const Vector<Real> advantage = scan<Real>(delta, decay) + decay_to_end * following.advantage;
    following = {splat(advantage[0]), splat(v[0])};
    block.write(advantages, advantage);
    block.write(returns, advantage + v);
  }

  // A token that does not count passes on what it gets from the token after it: the value unchanged, the advantage
  // without decay.
  template <class Block>
  TLCR_INLINE void mixed_block(Block block, Following<Real>& following) const {
    const Vector<Real> zero = {};
    const Mask<Real> counts = block.counts(mask);
    const Vector<Real> r = block.read(rewards), v = counts ? block.read(values) : zero;
    Mask<Real> known = counts;
    Vector<Real> value_from_here = next_known<Real>(v, known);
    value_from_here = known ? value_from_here : following.value;
    const Vector<Real> delta = counts ? r + gamma * later_lanes<Real, 1>(value_from_here, following.value) - v : zero;
    Vector<Real> decay_from_here = counts ? splat(decay) : splat(Real(1));
    Vector<Real> advantage = scan<Real>(delta, decay_from_here);
    advantage += decay_from_here * following.advantage;
    following = {splat(advantage[0]), splat(value_from_here[0])};
    block.write(advantages, counts ? advantage : zero);
    block.write(returns, counts ? advantage + v : zero);
  }

  void zero(int64_t begin, int64_t end) const {
    for (int64_t at = begin; at < end; ++at) advantages[at] = returns[at] = 0;
  }
};

template <class Real>
void gae_of(const GaeArguments& a, int64_t begin, int64_t end) {
  const Gae<Real> gae(a);
  if (a.cu_seqlens == nullptr) {
    for (int64_t b = begin; b < end; ++b) gae.sequence(b * a.length, (b + 1) * a.length);
    return;
  }
  for (int64_t b = begin; b < end; ++b) gae.sequence(a.cu_seqlens[b], a.cu_seqlens[b + 1]);
  if (end == a.sequences) gae.zero(a.cu_seqlens[end], a.length);
}

void gae(const GaeArguments& a, int64_t begin, int64_t end) {
  a.type == Type::kDouble ? gae_of<double>(a, begin, end) : gae_of<float>(a, begin, end);
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
