// Scoring: log-probability, entropy and KL of rows of logits, and the gradient.
//
// Each row is read once, in tiles that stay in the first-level cache while they are read twice: for their maximum, then
// for their sums. With z = x - max over the logits so far,
//
//     S = sum exp(z)      W = sum exp(z) z      K = sum exp(z) (z - z_ref)
//
// give log p = z - log S, H = log S - W / S and KL = K / S - log S + log S_ref. Shifted terms keep the digits that sums
// over raw logits would lose to a large common offset. A lane of a tile sums at most kTile / kVectorBytes / kUnroll of
// them in float; the rest is summed in double. When a tile raises the maximum the sums so far are moved to it.
#include "rows.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

// 8 KiB: a tile of each of two tensors, and their next tiles, which are being loaded, fill a cache of 32 KiB.
constexpr int kTileBytes = 8192;
// Independent sums, so that an addition need not wait for the one before.
constexpr int kUnroll = 4;

template <class Real>
constexpr int64_t kTile = kTileBytes / sizeof(Real);
template <class Real>
constexpr int64_t kStep = kUnroll * kLanes<Real>;

template <class Real>
TLCR_INLINE Real value_at(const void* values, int64_t row, Real otherwise) {
  return values ? static_cast<const Real*>(values)[row] : otherwise;
}

// Reciprocal of a row's temperature: the code multiplies by it everywhere.
template <class Real, class Arguments>
TLCR_INLINE Real inverse_temperature(const Arguments& args, int64_t row) {
  return Real(1 / (args.temperatures ? double(static_cast<const Real*>(args.temperatures)[row]) : args.temperature));
}

TLCR_INLINE double widen(float x) { return x; }
TLCR_INLINE double widen(double x) { return x; }
TLCR_INLINE double widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
TLCR_INLINE double widen(Half x) {
  Half lanes[kLanes<float>] = {x};
  return load(lanes)[0];
}

// `count` elements as Real, where they are if nothing is to be done. The last step is filled up with -inf, which adds
// nothing to any sum.
template <class Element>
TLCR_INLINE const Arithmetic<Element>* widen_tile(const Element* from, int64_t count, Arithmetic<Element>* buffer) {
  using Real = Arithmetic<Element>;
  constexpr bool kAsItIs = sizeof(Element) == sizeof(Real);
  if (kAsItIs && count % kStep<Real> == 0) return reinterpret_cast<const Real*>(from);
  int64_t i = 0;
  for (; i + kLanes<Real> <= count; i += kLanes<Real>) store(buffer + i, load(from + i));
  for (; i < count; ++i) buffer[i] = Real(widen(from[i]));
  for (; i % kStep<Real> != 0; ++i) buffer[i] = -Limits<Real>::infinity;
  return buffer;
}

// Prefetches the part of the next tile that takes the place of the step at `i`.
template <class Element>
TLCR_INLINE void prefetch_step(const Element* next_tile, int64_t i) {
  constexpr int kLine = 64;
  const char* at = reinterpret_cast<const char*>(next_tile + i);
  for (int offset = 0; offset < int(kStep<Arithmetic<Element>> * sizeof(Element)); offset += kLine) {
    __builtin_prefetch(at + offset);
  }
}

// Whether x * scale - offset is one instruction, without a rounding of the product.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// The logits of a row minus their maximum, divided by the temperature. One instruction where there is a fused one:
// z(x) = x * scale - offset, with offset = maximum * scale. Elsewhere the rounding of the product would grow as the
// temperature falls: z(x) = (x - offset) * scale, with offset = maximum, errs by a share of z alone.
template <class Real>
struct Shift {
  Real scale;
  Real offset;

  TLCR_INLINE Vector<Real> z(Vector<Real> x) const { return kFused ? x * scale - offset : (x - offset) * scale; }
  TLCR_INLINE double z(double x) const {
    return kFused ? x * double(scale) - double(offset) : (x - double(offset)) * double(scale);
  }
};

// One of the two distributions of a row: its shift and S.
template <class Real>
struct Softmax {
  Shift<Real> shift;
  Real maximum = Limits<Real>::lowest;  // of raw logits; finite, so that -inf minus it is -inf
  WideSum total;

  TLCR_INLINE explicit Softmax(Real scale) : shift{scale, 0} { shift.offset = offset(); }

  // Takes in a tile's maximum. Returns by how much z grows less: 0 if the maximum stays.
  TLCR_INLINE double raise(const Real* tile, int64_t count) {
    Vector<Real> largest_of[kUnroll];
    for (auto& x : largest_of) x = splat(maximum);
    for (int64_t i = 0; i < count; i += kStep<Real>) {
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) largest_of[k] = max(load(tile + i + k * kLanes<Real>), largest_of[k]);
    }
    const Real tile_maximum = largest<Real>(max(max(largest_of[0], largest_of[1]), max(largest_of[2], largest_of[3])));
    if (tile_maximum == maximum) return 0;
    const double before = shift.offset;
    maximum = tile_maximum;
    shift.offset = offset();
    const double moved = (before - double(shift.offset)) * (kFused ? 1.0 : double(shift.scale));
    return moved > Limits<double>::lowest ? moved : Limits<double>::lowest;
  }

 private:
  TLCR_INLINE Real offset() const {
    const Real x = kFused ? maximum * shift.scale : maximum;
    return x > Limits<Real>::lowest ? x : Limits<Real>::lowest;
  }
};

TLCR_INLINE void multiply(WideSum& sum, double factor) {
  sum.low = factor == 0 ? DoubleVector{} : sum.low * factor;
  sum.high = factor == 0 ? DoubleVector{} : sum.high * factor;
}

TLCR_INLINE void add_multiple(WideSum& sum, const WideSum& other, double factor) {
  sum.low += other.low * factor;
  sum.high += other.high * factor;
}

// What a row keeps for its backward pass: the offsets, 1 / S of the policy, and the mean K / S of z - z_ref.
template <class Real>
struct Stats {
  Real offset;
  Real value;

  static TLCR_INLINE Stats& of(void* stats, int64_t row) { return static_cast<Stats*>(stats)[row]; }
  static TLCR_INLINE const Stats& of(const void* stats, int64_t row) { return static_cast<const Stats*>(stats)[row]; }
};

template <class Real>
TLCR_INLINE Vector<Real> tree_sum(const Vector<Real> (&x)[kUnroll]) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}

// Computes K where the sum by tiles is not finite: a term that was infinite under an earlier maximum may have
// probability 0 under the last one. Reads the row again.
template <class Element>
double difference_sum(const Element* logits, const Element* ref_logits, int64_t vocabulary,
                      const Shift<Arithmetic<Element>>& shift, const Shift<Arithmetic<Element>>& ref_shift) {
  double total = 0;
  for (int64_t v = 0; v < vocabulary; ++v) {
    const double z = shift.z(widen(logits[v])), p = __builtin_exp(z);
    if (Arithmetic<Element>(p) != 0) total += p * (z - ref_shift.z(widen(ref_logits[v])));
  }
  return total;
}

template <class Element, bool kReference>
TLCR_INLINE void score_row(const ScoreArguments& args, int64_t row) {
  using Real = Arithmetic<Element>;
  alignas(64) Real buffer[kTile<Real>], ref_buffer[kReference ? kTile<Real> : 1];
  const Element* const logits = row_of<Element>(args.logits, row);
  const Element* const ref_logits = kReference ? row_of<Element>(args.ref_logits, row) : nullptr;
  Softmax<Real> policy(inverse_temperature<Real>(args, row)), reference(policy.shift.scale);
  WideSum weighted, difference;  // W and K

  for (int64_t begin = 0; begin < args.vocabulary; begin += kTile<Real>) {
    const int64_t left = args.vocabulary - begin, count = left < kTile<Real> ? left : kTile<Real>;
    const Real* const tile = widen_tile(logits + begin, count, buffer);
    const Real* const ref_tile = kReference ? widen_tile(ref_logits + begin, count, ref_buffer) : nullptr;
    const double moved = policy.raise(tile, count), ref_moved = kReference ? reference.raise(ref_tile, count) : 0;
    // The first tile moves no sums: there are none yet.
    if (begin != 0 && (moved != 0 || ref_moved != 0)) {
      const double factor = __builtin_exp(moved);
      add_multiple(weighted, policy.total, moved);
      multiply(weighted, factor);
      if (kReference) {
        add_multiple(difference, policy.total, moved - ref_moved);
        multiply(difference, factor);
        multiply(reference.total, __builtin_exp(ref_moved));
      }
      multiply(policy.total, factor);
    }

    const Shift<Real> shift = policy.shift, ref_shift = reference.shift;
    const auto floor = splat(Limits<Real>::exp_is_zero);
    Vector<Real> S[kUnroll]{}, W[kUnroll]{}, K[kUnroll]{}, ref_S[kUnroll]{};
    for (int64_t i = 0; i < count; i += kStep<Real>) {
      prefetch_step(logits + begin + kTile<Real>, i);
      if (kReference) prefetch_step(ref_logits + begin + kTile<Real>, i);
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) {
        // Below the floor p is 0, so the product of p and the bounded z is 0 too.
        const auto z = max(floor, shift.z(load(tile + i + k * kLanes<Real>)));
        const auto p = exp_of_nonpositive<Real>(z);
        S[k] += p;
        W[k] += p * z;
        if (kReference) {
          const auto ref_z = ref_shift.z(load(ref_tile + i + k * kLanes<Real>));
          ref_S[k] += exp_of_nonpositive<Real>(max(floor, ref_z));
          K[k] += p * (p == 0 ? Vector<Real>{} : z - ref_z);
        }
      }
    }
    policy.total.add(tree_sum<Real>(S));
    weighted.add(tree_sum<Real>(W));
    if (kReference) {
      difference.add(tree_sum<Real>(K));
      reference.total.add(tree_sum<Real>(ref_S));
    }
  }

  const int64_t token = args.token_ids[row];
  const auto out = [row](void* to, double x) { static_cast<Real*>(to)[row] = Real(x); };
  // Returns log S.
  const auto finish = [&](const Softmax<Real>& softmax, const Element* x, void* logprobs) {
    const double log_sum = __builtin_log(softmax.total.total());
    const double logprob = softmax.shift.z(widen(x[token])) - log_sum;
    out(logprobs, logprob > 0 ? 0 : logprob);  // the rounding of an offset may put it above
    return log_sum;
  };
  const double inverse_total = 1 / policy.total.total(), log_sum = finish(policy, logits, args.logprobs);
  out(args.entropy, log_sum - weighted.total() * inverse_total);
  Stats<Real>::of(args.stats, row) = {policy.shift.offset, Real(inverse_total)};
  if (kReference) {
    const double ref_log_sum = finish(reference, ref_logits, args.ref_logprobs);
    double mean = difference.total() * inverse_total;
    if (!__builtin_isfinite(mean)) {
      mean = difference_sum(logits, ref_logits, args.vocabulary, policy.shift, reference.shift) * inverse_total;
    }
    out(args.kl, mean - log_sum + ref_log_sum);
    Stats<Real>::of(args.ref_stats, row) = {reference.shift.offset, Real(mean)};
  }
}

template <class Element>
void score_rows(const ScoreArguments& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    args.ref_logits.data ? score_row<Element, true>(args, row) : score_row<Element, false>(args, row);
  }
}

void score(const ScoreArguments& args, int64_t begin, int64_t end) {
  with_type(args.type, [&](auto element) { score_rows<decltype(element)>(args, begin, end); });
}

// Writes the `count` results in `tile`. The results of a whole tile of Real are in place already.
template <class Element>
TLCR_INLINE void narrow_tile(const Arithmetic<Element>* tile, int64_t count, Element* to) {
  using Real = Arithmetic<Element>;
  int64_t i = 0;
  for (; i + kLanes<Real> <= count; i += kLanes<Real>) store(to + i, load(tile + i));
  if (i == count) return;
  Element last[kLanes<Real>];
  store(last, load(tile + i));  // a tile is filled up to whole steps
  for (int lane = 0; i + lane < count; ++lane) to[i + lane] = last[lane];
}

template <class Element, class Gradient, bool kReference>
TLCR_INLINE void grad_row(const ScoreBackwardArguments& args, int64_t row, double g_logprob, double g_entropy,
                          double g_kl) {
  using Real = Arithmetic<Element>;
  alignas(64) Real buffer[kTile<Real>], ref_buffer[kReference ? kTile<Real> : 1];
  const Element* const logits = row_of<Element>(args.logits, row);
  const Element* const ref_logits = kReference ? row_of<Element>(args.ref_logits, row) : nullptr;
  Gradient* const grad = row_of<Gradient>(args.grad_logits, row);
  const Real scale = inverse_temperature<Real>(args, row);
  const Stats<Real> stats = Stats<Real>::of(args.stats, row);
  const Stats<Real> ref_stats = kReference ? Stats<Real>::of(args.ref_stats, row) : Stats<Real>{};
  const Shift<Real> shift{scale, stats.offset}, ref_shift{scale, ref_stats.offset};

  // dx / temperature = p (of_one + of_z z + of_difference (z - z_ref - mean)). Where p is near 1, the bracket of the KL
  // is near 0, and its terms cancel exactly. With log S, log S_ref and KL in place of the mean, each would add a
  // rounding error.
  double constant = -g_logprob;
  if (g_entropy != 0)
    constant -= g_entropy * (double(value_at<Real>(args.entropy, row, 0)) + __builtin_log(stats.value));
  const Real of_one = Real(constant * scale), of_z = Real(-g_entropy * scale), of_difference = Real(g_kl * scale);
  const Real inverse_sum = stats.value, mean = ref_stats.value;
  const int64_t token = args.token_ids[row] - args.first_entry;

  for (int64_t begin = 0; begin < args.vocabulary; begin += kTile<Real>) {
    const int64_t left = args.vocabulary - begin, count = left < kTile<Real> ? left : kTile<Real>;
    const Real* const tile = widen_tile(logits + begin, count, buffer);
    const Real* const ref_tile = kReference ? widen_tile(ref_logits + begin, count, ref_buffer) : nullptr;
    const bool in_place = sizeof(Gradient) == sizeof(Real) && count == kTile<Real>;
    Real* const result = in_place ? reinterpret_cast<Real*>(grad + begin) : buffer;

    const auto floor = splat(Limits<Real>::exp_is_zero);
    for (int64_t i = 0; i < count; i += kStep<Real>) {
      prefetch_step(logits + begin + kTile<Real>, i);
      if (kReference) prefetch_step(ref_logits + begin + kTile<Real>, i);
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t at = i + k * kLanes<Real>;
        const auto z = max(floor, shift.z(load(tile + at)));
        const Vector<Real> p = exp_of_nonpositive<Real>(z) * inverse_sum;
        Vector<Real> factor = of_one + of_z * z;
        if (kReference) {
          factor += of_difference * (z - ref_shift.z(load(ref_tile + at)) - mean);
          factor = p == 0 ? Vector<Real>{} : factor;
        }
        store(result + at, p * factor);
      }
    }
    if (begin <= token && token < begin + count) result[token - begin] += Real(g_logprob * scale);
    if (!in_place) narrow_tile(result, count, grad + begin);
  }
}

template <class Element, class Gradient>
void score_backward_rows(const ScoreBackwardArguments& args, int64_t begin, int64_t end) {
  using Real = Arithmetic<Element>;
  for (int64_t row = begin; row < end; ++row) {
    const Real g_logprob = value_at<Real>(args.g_logprobs, row, 0), g_entropy = value_at<Real>(args.g_entropy, row, 0);
    const Real g_kl = value_at<Real>(args.g_kl, row, 0);
    if (g_kl != 0) {
      grad_row<Element, Gradient, true>(args, row, g_logprob, g_entropy, g_kl);
    } else if (g_logprob != 0 || g_entropy != 0) {
      grad_row<Element, Gradient, false>(args, row, g_logprob, g_entropy, 0);
    } else {
      __builtin_memset(row_of<Gradient>(args.grad_logits, row), 0, sizeof(Gradient) * args.vocabulary);
    }
  }
}

void score_backward(const ScoreBackwardArguments& args, int64_t begin, int64_t end) {
  with_type(args.grad_type, [&](auto gradient) {
    using Gradient = decltype(gradient);
    args.type == args.grad_type ? score_backward_rows<Gradient, Gradient>(args, begin, end)
                                : score_backward_rows<Arithmetic<Gradient>, Gradient>(args, begin, end);
  });
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
