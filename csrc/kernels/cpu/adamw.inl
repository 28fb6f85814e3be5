// One step of AdamW for bfloat16 weights that are the upper half of float32 masters: each is read and written once.

#include "simd.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

using Bits = Vector<uint32_t>;
using RemaindersVector = VectorOf<int16_t, kVectorBytes / 2>::type;

template <class Halves>
TLCR_INLINE Halves load_halves(const void* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return halves;
}

// The bits of a master: the bits of the weight are the upper half, and the remainder, which has a sign, is added.
TLCR_INLINE FloatVector join(HalvesVector weight, RemaindersVector remainder) {
  const auto low = __builtin_convertvector(remainder, Vector<int32_t>);
  return bit_cast<FloatVector>((__builtin_convertvector(weight, Bits) << 16) + bit_cast<Bits>(low));
}

// A weight is the bfloat16 nearest to its master; of two that are equally near, the larger in magnitude. The remainder
// is the difference of their bits. Of a NaN only the upper half is kept, as a quiet NaN, because a remainder that is
// added to its bits could make it a number.
TLCR_INLINE void split(FloatVector master, HalvesVector& weight, RemaindersVector& remainder) {
  const auto is_number = master == master;
  const Bits bits = bit_cast<Bits>(master);
  const Bits rounded = is_number ? bits + 0x8000 : bits | 0x400000;
  weight = __builtin_convertvector(rounded >> 16, HalvesVector);
  const Bits low = is_number ? bits & 0xffff : Bits{};
  remainder = bit_cast<RemaindersVector>(__builtin_convertvector(low, HalvesVector));
}

struct AdamW {
  float decay;             // 1 - learning rate * weight decay
  float keep, take;        // beta1 and 1 - beta1
  float keep_sq, take_sq;  // beta2 and 1 - beta2
  float step_size;         // learning rate / (1 - beta1^step)
  float correction;        // sqrt(1 - beta2^step)
  float eps;

  explicit AdamW(const AdamWArguments& a)
      : decay(a.decay),
        keep(a.beta1),
        take(1 - a.beta1),
        keep_sq(a.beta2),
        take_sq(1 - a.beta2),
        step_size(a.step_size),
        correction(a.correction),
        eps(a.eps) {}

  TLCR_INLINE void update(uint16_t* weights, const BFloat16* gradients, float* exp_avg, float* exp_avg_sq,
                          int16_t* remainders) const {
    const FloatVector g = load(gradients);
    const FloatVector m = load(exp_avg) * keep + g * take;
    const FloatVector v = load(exp_avg_sq) * keep_sq + g * g * take_sq;
    store(exp_avg, m);
    store(exp_avg_sq, v);
    FloatVector master = join(load_halves<HalvesVector>(weights), load_halves<RemaindersVector>(remainders));
    master = master * decay - m * step_size / (square_root(v) / correction + eps);
    HalvesVector weight;
    RemaindersVector remainder;
    split(master, weight, remainder);
    __builtin_memcpy(weights, &weight, sizeof(weight));
    __builtin_memcpy(remainders, &remainder, sizeof(remainder));
  }
};

void adamw(const AdamWArguments& a, int64_t begin, int64_t end) {
  constexpr int64_t kStep = kLanes<float>;
  const AdamW step(a);
  const auto* gradients = static_cast<const BFloat16*>(a.gradients);
  int64_t at = begin;
  for (; at + kStep <= end; at += kStep) {
    step.update(a.weights + at, gradients + at, a.exp_avg + at, a.exp_avg_sq + at, a.remainders + at);
  }
  // The last weights, fewer than there are lanes, are copied to memory that has room for all lanes.
  const int64_t left = end - at;
  uint16_t weights[kStep] = {};
  int16_t remainders[kStep] = {};
  BFloat16 g[kStep] = {};
  float m[kStep] = {}, v[kStep] = {};
  __builtin_memcpy(weights, a.weights + at, left * sizeof(*weights));
  __builtin_memcpy(remainders, a.remainders + at, left * sizeof(*remainders));
  __builtin_memcpy(g, gradients + at, left * sizeof(*g));
  __builtin_memcpy(m, a.exp_avg + at, left * sizeof(*m));
  __builtin_memcpy(v, a.exp_avg_sq + at, left * sizeof(*v));
  step.update(weights, g, m, v, remainders);
  __builtin_memcpy(a.weights + at, weights, left * sizeof(*weights));
  __builtin_memcpy(a.remainders + at, remainders, left * sizeof(*remainders));
  __builtin_memcpy(a.exp_avg + at, m, left * sizeof(*m));
  __builtin_memcpy(a.exp_avg_sq + at, v, left * sizeof(*v));
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
