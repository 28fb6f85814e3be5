// Matrix products whose factors are half precision and whose sums and result are float32.
#pragma once

#include <ATen/ATen.h>

namespace tlcr {

// Whether `product` can multiply matrices of this dtype on this device without widening them first.
bool multiplies_into_float(const at::Tensor& factor);

// left (M, K) times right (K, N), both of one half-precision dtype for which multiplies_into_float, into `result` (M,
// N), which is contiguous and float32.
void product(at::Tensor result, const at::Tensor& left, const at::Tensor& right);

// The same, added to what `sum` holds.
void add_product(at::Tensor sum, const at::Tensor& left, const at::Tensor& right);

}  // namespace tlcr
