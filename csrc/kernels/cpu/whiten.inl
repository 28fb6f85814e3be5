// Whitening of advantages: zero mean and unit population variance over the counted ones. One thread sums in one order.

#include "blocks.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

constexpr double kWhitenFloor = 16;  // as in tlcr/ops/gae.py

template <class Real>
void whiten_of(const WhitenArguments& a) {
  Real* x = static_cast<Real*>(a.advantages);
  const Vector<Real> zero = {};

  WideSum sum;
  int64_t counted = 0;
  for_each_stretch<Real>(0, a.count, [&](int64_t begin, int64_t end) {
    Vector<Real> near = {};
    Mask<Real> count = {};
    for_each_block<Real>(begin, end, [&](auto block) {
      const Mask<Real> counts = block.counts(a.mask);
      near += counts ? block.read(x) : zero;
      count -= counts;
    });
    sum.add(near);
    for (int lane = 0; lane < kLanes<Real>; ++lane) counted += count[lane];
  });
  const double n = counted > 0 ? counted : 1;
  const double mean = sum.total() / n;

  // The mean is rounded to Real, so that differences from it are formed without losing digits. Its rounding error is
  // found from those differences.
  const Real centre = mean;
  WideSum centred_sum, squares_sum;
  for_each_stretch<Real>(0, a.count, [&](int64_t begin, int64_t end) {
    Vector<Real> near = {}, squares = {};
    for_each_block<Real>(begin, end, [&](auto block) {
      const Vector<Real> centred = block.counts(a.mask) ? block.read(x) - centre : zero;
      near += centred;
      squares += centred * centred;
    });
    centred_sum.add(near);
    squares_sum.add(squares);
  });
  const double rest = centred_sum.total() / n;
  const double variance = squares_sum.total() / n - rest * rest;
  const double deviation = __builtin_sqrt(variance < 0 ? 0 : variance);
  // A deviation of only a few rounding errors of the mean comes from rounding: the advantages are equal.
  const double magnitude = mean < 0 ? -mean : mean;
  const bool flat = deviation <= kWhitenFloor * Limits<Real>::epsilon * magnitude;

  const Real shift = rest, factor = 1 / deviation;
  for_each_block<Real>(0, a.count, [&](auto block) {
    const Vector<Real> whitened = ((block.read(x) - centre) - shift) * factor;
    block.write(x, flat ? zero : block.counts(a.mask) ? whitened : zero);
  });
}

void whiten(const WhitenArguments& a) { a.type == Type::kDouble ? whiten_of<double>(a) : whiten_of<float>(a); }

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
