#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, digits = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | digits << 13);
  const float size = exponent == 0 ? ldexpf(static_cast<float>(digits), -24)
                                   : ldexpf(static_cast<float>(digits + 1024), static_cast<int>(exponent) - 25);
  return sign != 0 ? -size : size;
}

// To the nearest, ties to even.
inline __half __float2half_rn(float x) {
  const uint16_t sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000);
  const float size = fabsf(x);
  if (x != x) return {0x7fff};
  if (size >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  frexpf(size, &exponent);                                 // size is in [2^(exponent - 1), 2^exponent)
  const int last = size < 0x1p-14f ? -24 : exponent - 11;  // the weight of the last digit that is kept, a power of 2
  const int digits = static_cast<int>(nearbyintf(ldexpf(size, -last)));
  // A carry out of the digits goes into the exponent where it belongs.
  return {static_cast<uint16_t>(sign | (((last + 24) << 10) + digits))};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
