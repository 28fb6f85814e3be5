// exp and expm1 together: the two cost hardly more than one.
#pragma once

#include "simd.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

template <class Real>
struct Exponentials {
  Vector<Real> exp, expm1;  // expm1 is exp - 1, without the cancellation near 0
};

// For x <= 80. The result is 0 where exp(x) is below the least normal number.
template <class Real>
TLCR_INLINE Exponentials<Real> exponentials(Vector<Real> x) {
  using E = Exponential<Real>;
  using Integers = Vector<typename E::Integer>;
  const Vector<Real> bounded = max(splat(Limits<Real>::exp_is_normal), x);
  const Vector<Real> rounded = bounded * E::log2_e + E::rounder;
  const Vector<Real> n = rounded - E::rounder;
  const Vector<Real> r = (bounded - n * E::log_2_high) - n * E::log_2_low;
  const auto power = bit_cast<Vector<Real>>((bit_cast<Integers>(rounded) + E::bias) << E::mantissa_bits);
  const Vector<Real> grown = power * (E::slope_at(r) * r);
  return {x < Limits<Real>::exp_is_normal ? Vector<Real>{} : power + grown, grown + (power - 1)};
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
