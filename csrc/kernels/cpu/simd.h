// Vectors of one instruction set, as wide as its registers, and the kernels' operations on them.
//
// Each of baseline.cpp, avx2.cpp and avx512.cpp compiles the kernels once more, for its own instruction set. If a
// function in them were weak, as inline functions and templates of a header are, the linker would keep one copy of it
// for all three, perhaps the AVX-512 one, and older processors would fail with an illegal instruction. Therefore
// everything in them has internal linkage (unnamed namespaces), and they include nothing of the standard library but
// <cstdint>.
//
// The including file sets its target by pragma and gives the width in TLCR_VECTOR_BYTES: 64 for AVX-512, 32 for AVX2
// with FMA and F16C, 16 for any processor. g++ before 14 does not define __AVX2__ and similar macros for a pragma.
#pragma once

#include <cstdint>

#if TLCR_VECTOR_BYTES > 16
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12 warns of its own AVX-512 intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define TLCR_INLINE inline __attribute__((always_inline))

namespace tlcr::cpu::TLCR_ISA {
namespace {

constexpr int kVectorBytes = TLCR_VECTOR_BYTES;

template <class Element, int kBytes>
struct VectorOf {
  typedef Element type __attribute__((vector_size(kBytes)));
};
template <class Element>
using Vector = typename VectorOf<Element, kVectorBytes>::type;
using FloatVector = Vector<float>;
using DoubleVector = Vector<double>;

template <class Element>
constexpr int kLanes = kVectorBytes / sizeof(Element);

// As many 16-bit numbers as there are floats in a vector.
using HalvesVector = VectorOf<uint16_t, kVectorBytes / 2>::type;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type of the arithmetic on elements of a type.
template <class Element>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class Element>
using Arithmetic = typename ArithmeticOf<Element>::type;

template <class Real>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float infinity = __builtin_inff();
  static constexpr float epsilon = 0x1p-23f;
  static constexpr float lowest = -3.40282347e+38f;
  static constexpr float exp_is_zero = -104.0f;   // here and below exp rounds to 0
  static constexpr float exp_is_normal = -87.0f;  // here and above the result is no subnormal number
};
template <>
struct Limits<double> {
  static constexpr double infinity = __builtin_inf();
  static constexpr double epsilon = 0x1p-52;
  static constexpr double lowest = -1.7976931348623157e+308;
  static constexpr double exp_is_zero = -746.0;
  static constexpr double exp_is_normal = -708.0;
};

template <class To, class From>
TLCR_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Real>
TLCR_INLINE Vector<Real> splat(Real x) {
  return x - Vector<Real>{};
}

// Loads and stores at any address.

TLCR_INLINE FloatVector load(const float* from) {
  FloatVector x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

TLCR_INLINE DoubleVector load(const double* from) {
  DoubleVector x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

TLCR_INLINE void store(float* to, FloatVector x) { __builtin_memcpy(to, &x, sizeof(x)); }
TLCR_INLINE void store(double* to, DoubleVector x) { __builtin_memcpy(to, &x, sizeof(x)); }

TLCR_INLINE FloatVector load(const BFloat16* from) {
  HalvesVector halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return bit_cast<FloatVector>(__builtin_convertvector(halves, Vector<uint32_t>) << 16);
}

// The bits of the nearest bfloat16 in the upper half of each lane; of two that are equally near, the even one. A NaN
// stays NaN.
TLCR_INLINE Vector<uint32_t> nearest_bfloat16(FloatVector x) {
  const auto bits = bit_cast<Vector<uint32_t>>(x);
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

TLCR_INLINE void store(BFloat16* to, FloatVector x) {
  const auto halves = __builtin_convertvector(nearest_bfloat16(x) >> 16, HalvesVector);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

#if TLCR_VECTOR_BYTES == 64

TLCR_INLINE FloatVector load(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

TLCR_INLINE void store(Half* to, FloatVector x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif TLCR_VECTOR_BYTES == 32

TLCR_INLINE FloatVector load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

TLCR_INLINE void store(Half* to, FloatVector x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else

// Exponents move by 127 - 15. For a result that is subnormal as a half, a number whose last bit is the unit of the
// subnormals is added and then subtracted: the addition rounds.
TLCR_INLINE FloatVector load(const Half* from) {
  HalvesVector halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  const auto bits = __builtin_convertvector(halves, Vector<uint32_t>);
  const auto magnitude = (bits & 0x7fff) << 13;
  const auto normal = magnitude + (112u << 23);
  const auto special = magnitude + (224u << 23);  // inf and NaN
  const FloatVector subnormal =
      bit_cast<FloatVector>(magnitude + (113u << 23)) - bit_cast<FloatVector>(Vector<uint32_t>{} + (113u << 23));
  auto result = magnitude >= (31u << 23) ? special : normal;
  result = magnitude < (1u << 23) ? bit_cast<Vector<uint32_t>>(subnormal) : result;
  return bit_cast<FloatVector>(result | (bits & 0x8000) << 16);
}

TLCR_INLINE void store(Half* to, FloatVector x) {
  const auto bits = bit_cast<Vector<uint32_t>>(x);
  const auto magnitude = bits & 0x7fffffff;
  const auto normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const auto subnormal = bit_cast<Vector<uint32_t>>(bit_cast<FloatVector>(magnitude) + 0.5f) - (126u << 23);
  auto result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? Vector<uint32_t>{} + 0x7c00 : result;
  result = x == x ? result : Vector<uint32_t>{} + 0x7e00;
  const auto halves = __builtin_convertvector(result | (bits >> 16 & 0x8000), HalvesVector);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

#endif

// The larger; `b` where either is NaN. The compiler does not use these instructions for a comparison and a choice.
#if TLCR_VECTOR_BYTES == 64
TLCR_INLINE FloatVector max(FloatVector a, FloatVector b) { return _mm512_max_ps(a, b); }
TLCR_INLINE DoubleVector max(DoubleVector a, DoubleVector b) { return _mm512_max_pd(a, b); }
#elif TLCR_VECTOR_BYTES == 32
TLCR_INLINE FloatVector max(FloatVector a, FloatVector b) { return _mm256_max_ps(a, b); }
TLCR_INLINE DoubleVector max(DoubleVector a, DoubleVector b) { return _mm256_max_pd(a, b); }
#else
TLCR_INLINE FloatVector max(FloatVector a, FloatVector b) { return a > b ? a : b; }
TLCR_INLINE DoubleVector max(DoubleVector a, DoubleVector b) { return a > b ? a : b; }
#endif

#if TLCR_VECTOR_BYTES == 64
TLCR_INLINE FloatVector square_root(FloatVector x) { return _mm512_sqrt_ps(x); }
#elif TLCR_VECTOR_BYTES == 32
TLCR_INLINE FloatVector square_root(FloatVector x) { return _mm256_sqrt_ps(x); }
#else
TLCR_INLINE FloatVector square_root(FloatVector x) {
  for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}
#endif

// Results over all lanes, taken in their order. This is slow: for the end of a row, not for a loop.

template <class Real>
TLCR_INLINE Real largest(Vector<Real> x) {
  Real result = x[0];
  for (int lane = 1; lane < kLanes<Real>; ++lane) result = x[lane] > result ? x[lane] : result;
  return result;
}

TLCR_INLINE double sum(DoubleVector x) {
  double result = x[0];
  for (int lane = 1; lane < kLanes<double>; ++lane) result += x[lane];
  return result;
}

// A sum of many vectors, each of which is a sum of a few numbers per lane: kept in double, lane by lane.
struct WideSum {
  DoubleVector low, high;

  // Written by hand: g++ compiles a generated constructor for the baseline, and without optimisation does not inline
  // it.
  TLCR_INLINE WideSum() : low{}, high{} {}

  TLCR_INLINE void add(DoubleVector x) { low += x; }
  TLCR_INLINE void add(FloatVector x) {
    typename VectorOf<float, kVectorBytes / 2>::type halves[2];
    __builtin_memcpy(halves, &x, sizeof(halves));
    low += __builtin_convertvector(halves[0], DoubleVector);
    high += __builtin_convertvector(halves[1], DoubleVector);
  }
  TLCR_INLINE double total() const { return sum(low + high); }
};

// exp(x) = 2^n exp(r) with n = round(x / log 2) and |r| <= log(2) / 2. Adding `rounder` to x / log 2 rounds it, and the
// last bits of the sum are n. log 2 is stored as the sum of two numbers, and n times the first is exact.
// exp(r) = 1 + r slope(r) with slope(r) = 1 + r P(r), where P was fitted to the least relative error: 3.2e-9 in float
// and 3.8e-18 in double.
template <class Real>
struct Exponential;

template <>
struct Exponential<float> {
  static constexpr float log2_e = 0x1.715476p+0f, log_2_high = 0x1.63p-1f, log_2_low = -0x1.bd0106p-13f;
  static constexpr float rounder = 0x1.8p+23f;

  static TLCR_INLINE FloatVector slope_at(FloatVector r) {
    FloatVector y = splat(0x1.6a5426p-10f);
    y = y * r + 0x1.12398cp-7f;
    y = y * r + 0x1.5558aap-5f;
    y = y * r + 0x1.555492p-3f;
    y = y * r + 0x1.fffffcp-2f;
    return y * r + 1.0f;
  }

  using Integer = int32_t;
  static constexpr int mantissa_bits = 23, bias = 127;
};

template <>
struct Exponential<double> {
  static constexpr double log2_e = 0x1.71547652b82fep+0, log_2_high = 0x1.62e42feep-1;
  static constexpr double log_2_low = 0x1.a39ef35793c76p-33;
  static constexpr double rounder = 0x1.8p+52;

  static TLCR_INLINE DoubleVector slope_at(DoubleVector r) {
    DoubleVector y = splat(0x1.ad9c02d12b416p-26);
    y = y * r + 0x1.28ae1e4b28ae4p-22;
    y = y * r + 0x1.71df133c1023fp-19;
    y = y * r + 0x1.a019993ef89e5p-16;
    y = y * r + 0x1.a01a01327d329p-13;
    y = y * r + 0x1.6c16c18480b11p-10;
    y = y * r + 0x1.1111111126386p-7;
    y = y * r + 0x1.555555555069fp-5;
    y = y * r + 0x1.55555555555p-3;
    y = y * r + 0x1.000000000000ap-1;
    return y * r + 1.0;
  }

  using Integer = int64_t;
  static constexpr int mantissa_bits = 52, bias = 1023;
};

template <class Real>
TLCR_INLINE Vector<Real> exp_remainder(Vector<Real> x, Vector<Real> n) {
  using E = Exponential<Real>;
  const Vector<Real> r = (x - n * E::log_2_high) - n * E::log_2_low;
  return E::slope_at(r) * r + Real(1);
}

#if TLCR_VECTOR_BYTES == 64

TLCR_INLINE FloatVector scale(FloatVector x, FloatVector n) { return _mm512_scalef_ps(x, n); }
TLCR_INLINE DoubleVector scale(DoubleVector x, DoubleVector n) { return _mm512_scalef_pd(x, n); }

// exp(x) for x <= 1 that is not below Limits::exp_is_zero. Results below the least normal number are rounded to a
// subnormal number or to 0; NaN gives NaN.
template <class Real>
TLCR_INLINE Vector<Real> exp_of_nonpositive(Vector<Real> x) {
  using E = Exponential<Real>;
  const Vector<Real> n = (x * E::log2_e + E::rounder) - E::rounder;
  return scale(exp_remainder<Real>(x, n), n);
}

#else

// For instruction sets that have no instruction for scaling. 2^(n + bias / 2) is formed by shifting n into the exponent
// bits; the rounder has already added what makes n a biased exponent. That power is a normal number for every n, and
// the last product, with 2^-(bias / 2), rounds.
template <class Real>
TLCR_INLINE Vector<Real> exp_of_nonpositive(Vector<Real> x) {
  using E = Exponential<Real>;
  constexpr int kLift = E::bias / 2;
  constexpr Real kRounder = E::rounder + (E::bias + kLift);
  constexpr Real kLower = E::bias == 127 ? Real(0x1p-63) : Real(0x1p-511);
  const Vector<Real> biased = x * E::log2_e + kRounder;
  const auto power = bit_cast<Vector<Real>>(bit_cast<Vector<typename E::Integer>>(biased) << E::mantissa_bits);
  return exp_remainder<Real>(x, biased - kRounder) * power * kLower;
}

#endif

// exp(x) for every x. 2^n is the product of two factors, since 2^n may be out of range where the result is not.
template <class Real>
TLCR_INLINE Vector<Real> exp(Vector<Real> x) {
  using E = Exponential<Real>;
  using Integers = Vector<typename E::Integer>;
  x = max(splat(Limits<Real>::exp_is_zero), x);
  x = -max(splat(-Real(E::bias + 2)), -x);
  const Vector<Real> rounded = x * E::log2_e + E::rounder;
  const Integers n = bit_cast<Integers>(rounded) - bit_cast<Integers>(splat(E::rounder));
  const Integers half = n >> 1;
  const auto power = [](Integers k) { return bit_cast<Vector<Real>>((k + E::bias) << E::mantissa_bits); };
  return exp_remainder<Real>(x, rounded - E::rounder) * power(half) * power(n - half);
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
