// Matrix products whose sums and result are float32 (float64), in place.
#pragma once

#include "tensors.h"

namespace tlcr {

// Whether this processor has a product of bfloat16 matrices, with a float32 result.
bool cpu_multiplies_bfloat16();

// Whether half-precision matrices like this one can be multiplied without widening them first.
bool multiplies_into_float(const Tensor& factor);

// left (M, K) times right (K, N) into `result` (M, N), which is contiguous. The factors have its dtype, or one for
// which multiplies_into_float.
void product(const Tensor& result, const Tensor& left, const Tensor& right);

// The same, added to what `sum` holds.
void add_product(const Tensor& sum, const Tensor& left, const Tensor& right);

}  // namespace tlcr
