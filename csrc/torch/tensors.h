// Makes the pointers of arguments.h from tensors. The caller of a kernel keeps alive every tensor that it passes.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <optional>

#include "kernels/arguments.h"

namespace tlcr {

using at::Tensor;
using at::TensorList;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return Type::kFloat;
    case at::kDouble: return Type::kDouble;
    case at::kBFloat16: return Type::kBFloat16;
    case at::kHalf: return Type::kHalf;
    default:
      TORCH_CHECK_TYPE(false, "tlcr: dtype ", dtype, " has no kernel, wanted float32, float64, bfloat16 or float16");
  }
}

// The type of the arithmetic and the results: float64 where any input is float64, else float32.
inline at::ScalarType real_dtype(std::initializer_list<MaybeTensor> tensors) {
  for (const MaybeTensor& tensor : tensors)
    if (tensor.has_value() && tensor->scalar_type() == at::kDouble) return at::kDouble;
  return at::kFloat;
}

// The same, in a dtype that kernels read: that of the tensor if it is one of them, else float32.
inline Tensor readable(const Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  const bool known = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
  return known ? tensor : tensor.to(at::kFloat);
}

// Most tensors are that already, and torch's own functions take longer to see it.
inline Tensor dense(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype && tensor.is_contiguous() ? tensor : tensor.to(dtype).contiguous();
}

inline MaybeTensor dense(const MaybeTensor& tensor, at::ScalarType dtype) {
  return tensor.has_value() ? MaybeTensor(dense(*tensor, dtype)) : MaybeTensor();
}

inline void* pointer(const Tensor& tensor) { return tensor.numel() ? tensor.data_ptr() : nullptr; }

inline const void* pointer(const MaybeTensor& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

inline const uint8_t* bytes(const Tensor& mask) {
  return reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>());
}

// A tensor that is changed in place, as contiguous memory. Any other tensor is copied, and the copy is written back at
// the end.
class InPlace {
 public:
  explicit InPlace(const Tensor& tensor) : tensor_(tensor), dense_(tensor.contiguous()) {}
  InPlace(const InPlace&) = delete;
  InPlace& operator=(const InPlace&) = delete;
  ~InPlace() noexcept(false) {
    if (copied()) tensor_.copy_(dense_);
  }

  void* data() const { return pointer(dense_); }
  bool copied() const { return !dense_.is_same(tensor_); }

 private:
  Tensor tensor_, dense_;
};

// `base` moved by `elements` of `dtype`; null stays null.
template <typename Pointer>
Pointer* advanced(Pointer* base, int64_t elements, at::ScalarType dtype) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  return base ? static_cast<Byte*>(base) + elements * static_cast<int64_t>(at::elementSize(dtype)) : nullptr;
}

// A tensor (..., K) as rows of K elements: without a copy if its leading axes amount to two with any strides.
class RowsOf {
 public:
  explicit RowsOf(const Tensor& tensor) : tensor_(tensor) {
    if (!fill()) {
      tensor_ = tensor.contiguous();
      fill();
    }
  }

  const Rows& rows() const { return rows_; }

 private:
  bool fill() {
    const int64_t last = tensor_.dim() - 1;
    if (tensor_.size(last) > 1 && tensor_.stride(last) != 1) return false;
    rows_ = Rows{pointer(tensor_), 1, 0, 0};
    int axes = 0;
    int64_t size = 1, stride = 0;  // of the axis that grows, from the innermost outwards
    for (int64_t axis = last - 1; axis >= 0; --axis) {
      if (tensor_.size(axis) == 1) continue;
      if (axes > 0 && tensor_.stride(axis) == size * stride) {
        size *= tensor_.size(axis);
      } else {
        if (axes == 1) rows_.inner = size, rows_.inner_stride = stride;
        if (++axes > 2) return false;
        size = tensor_.size(axis), stride = tensor_.stride(axis);
      }
    }
    if (axes == 1) rows_.inner = size, rows_.inner_stride = stride;
    if (axes == 2) rows_.outer_stride = stride;
    return true;
  }

  Tensor tensor_;
  Rows rows_;
};

}  // namespace tlcr
