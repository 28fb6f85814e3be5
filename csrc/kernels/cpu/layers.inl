// Elementwise layers of a transformer, forward and backward: RMS norm and the gated SiLU. The arithmetic is in Real.
// Where torch would round between two operations of a model in half precision, this code rounds too, so that the
// results of a forward pass are the same.

#include "blocks.h"
#include "rows.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

// Rounds x as if it were stored as Element and loaded again.
TLCR_INLINE FloatVector rounded(FloatVector x, float) { return x; }
TLCR_INLINE DoubleVector rounded(DoubleVector x, double) { return x; }
TLCR_INLINE FloatVector rounded(FloatVector x, BFloat16) {
  return bit_cast<FloatVector>(nearest_bfloat16(x) & 0xffff0000);
}
TLCR_INLINE FloatVector rounded(FloatVector x, Half) {
  Half halves[kLanes<float>];
  store(halves, x);
  return load(halves);
}

template <class Element>
void rms_norm_of(const RMSNormArguments& a, int64_t begin, int64_t end) {
  using Real = Arithmetic<Element>;
  const auto* weight = static_cast<const Element*>(a.weight);
  for (int64_t n = begin; n < end; ++n) {
    const auto* x = static_cast<const Element*>(a.x) + n * a.width;
    auto* y = static_cast<Element*>(a.y) + n * a.width;
    WideSum squares;
    for_each_stretch<Real>(0, a.width, [&](int64_t from, int64_t to) {
      Vector<Real> sum = {};
      for_each_block<Real>(from, to, [&](auto block) {
        const Vector<Real> v = block.read(x);
        sum += v * v;
      });
      squares.add(sum);
    });
    const Real scale = 1 / __builtin_sqrt(squares.total() / a.width + a.eps);
    static_cast<Real*>(a.scales)[n] = scale;
    for_each_block<Real>(0, a.width, [&](auto block) {
      block.write(y, block.read(weight) * rounded(block.read(x) * scale, Element()));
    });
  }
}

// With n = x scale: dx = scale (g w - n mean(g w n)); dw is the sum of g n, here over a part of the rows.
template <class Element>
void rms_norm_backward_of(const RMSNormBackwardArguments& a, int64_t begin, int64_t end) {
  using Real = Arithmetic<Element>;
  const auto* weight = static_cast<const Element*>(a.weight);
  for (int64_t part = begin; part < end; ++part) {
    Real* sums = static_cast<Real*>(a.g_weight_parts) + part * a.width;
    for (int64_t i = 0; i < a.width; ++i) sums[i] = 0;
    const int64_t stop = (part + 1) * kNormRows < a.rows ? (part + 1) * kNormRows : a.rows;
    for (int64_t n = part * kNormRows; n < stop; ++n) {
      const auto* x = static_cast<const Element*>(a.x) + n * a.width;
      const auto* g = static_cast<const Element*>(a.g_y) + n * a.width;
      auto* g_x = static_cast<Element*>(a.g_x) + n * a.width;
      const Real scale = static_cast<const Real*>(a.scales)[n];
      WideSum products;
      for_each_stretch<Real>(0, a.width, [&](int64_t from, int64_t to) {
        Vector<Real> sum = {};
        for_each_block<Real>(from, to, [&](auto block) {
          const Vector<Real> product = block.read(g) * (block.read(x) * scale);
          block.write(sums, block.read(sums) + product);
          sum += product * block.read(weight);
        });
        products.add(sum);
      });
      const Real mean = products.total() / a.width;
      for_each_block<Real>(0, a.width, [&](auto block) {
        const Vector<Real> normed = block.read(x) * scale;
        block.write(g_x, (block.read(g) * block.read(weight) - normed * mean) * scale);
      });
    }
  }
}

// 1 / (1 + exp(-x)), computed from the exponential of -|x|, which does not overflow.
template <class Real>
TLCR_INLINE Vector<Real> sigmoid(Vector<Real> x) {
  const Vector<Real> e = exp_of_nonpositive<Real>(max(splat(Limits<Real>::exp_is_zero), x < 0 ? x : -x));
  return (x < 0 ? e : splat(Real(1))) / (Real(1) + e);
}

template <class Element>
void gated_silu_of(const GatedSiLUArguments& a, int64_t begin, int64_t end) {
  using Real = Arithmetic<Element>;
  const auto *gate = static_cast<const Element*>(a.gate), *up = static_cast<const Element*>(a.up);
  for_each_block<Real>(begin, end, [&](auto block) {
    const Vector<Real> z = block.read(gate);
    block.write(static_cast<Element*>(a.y), rounded(z * sigmoid<Real>(z), Element()) * block.read(up));
  });
}

// With s = sigmoid(z): d silu(z) = s (1 + z (1 - s)).
template <class Element>
void gated_silu_backward_of(const GatedSiLUBackwardArguments& a, int64_t begin, int64_t end) {
  using Real = Arithmetic<Element>;
  const auto *gate = static_cast<const Element*>(a.gate), *up = static_cast<const Element*>(a.up);
  for_each_block<Real>(begin, end, [&](auto block) {
    const Vector<Real> z = block.read(gate), g = block.read(static_cast<const Element*>(a.g_y));
    const Vector<Real> s = sigmoid<Real>(z);
    block.write(static_cast<Element*>(a.g_gate), g * block.read(up) * s * (Real(1) + z * (Real(1) - s)));
    block.write(static_cast<Element*>(a.g_up), g * rounded(z * s, Element()));
  });
}

void rms_norm(const RMSNormArguments& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto element) { rms_norm_of<decltype(element)>(a, begin, end); });
}

void rms_norm_backward(const RMSNormBackwardArguments& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto element) { rms_norm_backward_of<decltype(element)>(a, begin, end); });
}

void gated_silu(const GatedSiLUArguments& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto element) { gated_silu_of<decltype(element)>(a, begin, end); });
}

void gated_silu_backward(const GatedSiLUBackwardArguments& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto element) { gated_silu_backward_of<decltype(element)>(a, begin, end); });
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
