// g++'s shuffle of vectors, which clang lacks, so that clang-tidy can read csrc/kernels/cpu. Nothing is compiled with
// it.
#pragma once

template <class Vector, class Lanes>
Vector __builtin_shuffle(Vector x, Vector y, Lanes lanes) {
  constexpr int kCount = sizeof(x) / sizeof(x[0]);
  Vector result;
  for (int i = 0; i < kCount; ++i) result[i] = lanes[i] < kCount ? x[lanes[i]] : y[lanes[i] - kCount];
  return result;
}
