// Tensors through torch's stable ABI, and the pointers of arguments.h from them. The caller of a kernel keeps alive
// every tensor that it passes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/arguments.h"

// What torch says of the error of a function that has just failed; torch has it from 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace tlcr {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// The functions of the stable ABI return a code, because no exception may leave torch's library through them.
inline void check(AOTITorchError code) {
  if (code == AOTI_TORCH_SUCCESS) return;
  throw std::runtime_error(torch_exception_get_what_without_backtrace != nullptr
                               ? torch_exception_get_what_without_backtrace()
                               : "tlcr: torch failed in an operator of tlcr, and has written the reason to stderr");
}

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

// Calls an operator of torch by its name. The stable ABI passes no Scalar, so it reaches only operators without one.
template <typename... Values>
Tensor call(const char* name, const char* overload, const Values&... values) {
  std::array<StableIValue, sizeof...(Values)> stack{torch::stable::detail::from(values)...};
  check(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// torch's number of a dtype.
using Dtype = int32_t;
// NOLINTBEGIN(bugprone-throwing-static-initialization): functions of C, which throw nothing
inline const Dtype kFloat = aoti_torch_dtype_float32(), kDouble = aoti_torch_dtype_float64(),
                   kBFloat16 = aoti_torch_dtype_bfloat16(), kHalf = aoti_torch_dtype_float16(),
                   kBool = aoti_torch_dtype_bool(), kInt = aoti_torch_dtype_int32(), kLong = aoti_torch_dtype_int64();
// NOLINTEND(bugprone-throwing-static-initialization)

inline Dtype dtype_of(const Tensor& tensor) {
  Dtype dtype = 0;
  check(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline int64_t element_size(Dtype dtype) { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)); }

inline bool has_kernels(Dtype dtype) {
  return dtype == kFloat || dtype == kDouble || dtype == kBFloat16 || dtype == kHalf;
}

inline Type type_of(Dtype dtype) {
  require(has_kernels(dtype), "tlcr: a dtype has no kernel, wanted float32, float64, bfloat16 or float16");
  if (dtype == kFloat) return Type::kFloat;
  if (dtype == kDouble) return Type::kDouble;
  return dtype == kBFloat16 ? Type::kBFloat16 : Type::kHalf;
}

inline Type type_of(const Tensor& tensor) { return type_of(dtype_of(tensor)); }

inline bool is_double(const Tensor& tensor) { return dtype_of(tensor) == kDouble; }

inline bool is_double(const MaybeTensor& tensor) { return tensor.has_value() && is_double(*tensor); }

// The type of the arithmetic and the results: float64 where any input is float64, else float32.
template <typename... Tensors>
Dtype real_dtype(const Tensors&... tensors) {
  return (is_double(tensors) || ...) ? kDouble : kFloat;
}

// Contiguous and not initialised, on the device of `like`.
inline Tensor empty(Sizes sizes, Dtype dtype, const Tensor& like) {
  // A small call of an op makes several tensors: nearly all have few axes, which need no memory from the heap.
  constexpr std::size_t kFew = 8;
  std::array<int64_t, kFew> few{};
  std::vector<int64_t> many(sizes.size() > kFew ? sizes.size() : 0);
  int64_t* const strides = many.empty() ? few.data() : many.data();
  int64_t stride = 1;
  for (std::size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(1, sizes[axis]);
  }
  int32_t device = 0, index = 0;
  check(aoti_torch_get_device_type(like.get(), &device));
  check(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype, device, index,
                                 &handle));
  return Tensor(handle);
}

inline Tensor empty_as(const Tensor& tensor) { return empty(tensor.sizes(), dtype_of(tensor), tensor); }

inline void copy_into(const Tensor& target, const Tensor& source) {
  check(aoti_torch_copy_(target.get(), source.get(), /*non_blocking=*/0));
}

inline Tensor zeros(Sizes sizes, Dtype dtype, const Tensor& like) {
  Tensor tensor = empty(sizes, dtype, like);
  check(aoti_torch_zero_(tensor.get()));
  return tensor;
}

// Contiguous and of this dtype: the tensor itself, or a copy.
inline Tensor dense(const Tensor& tensor, Dtype dtype) {
  if (dtype_of(tensor) == dtype && tensor.is_contiguous()) return tensor;
  Tensor copy = empty(tensor.sizes(), dtype, tensor);
  copy_into(copy, tensor);
  return copy;
}

inline Tensor dense(const Tensor& tensor) { return dense(tensor, dtype_of(tensor)); }

inline MaybeTensor dense(const MaybeTensor& tensor, Dtype dtype) {
  return tensor.has_value() ? MaybeTensor(dense(*tensor, dtype)) : MaybeTensor();
}

// Of this dtype: the tensor itself, whatever its strides, or a copy.
inline Tensor cast(const Tensor& tensor, Dtype dtype) {
  return dtype_of(tensor) == dtype ? tensor : dense(tensor, dtype);
}

// In a dtype that kernels read: that of the tensor if it is one of them, else float32.
inline Tensor readable(const Tensor& tensor) {
  const Dtype dtype = dtype_of(tensor);
  return has_kernels(dtype) ? tensor : cast(tensor, kFloat);
}

// The memory of a tensor under other sizes and strides, from an element on.
inline Tensor view(const Tensor& tensor, Sizes sizes, Sizes strides, int64_t begin = 0) {
  AtenTensorHandle handle = nullptr;
  check(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                       begin, &handle));
  return Tensor(handle);
}

inline Tensor rows_of(const Tensor& matrix, int64_t begin, int64_t rows) {
  return view(matrix, {rows, matrix.size(1)}, matrix.strides(), begin * matrix.stride(0));
}

inline Tensor transposed(const Tensor& matrix) {
  return view(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// (..., K) as a matrix of rows.
inline Tensor flat(const Tensor& tensor) {
  const int64_t width = tensor.size(-1);
  if (tensor.is_contiguous()) return view(tensor, {tensor.numel() / std::max<int64_t>(1, width), width}, {width, 1});
  return torch::stable::reshape(tensor, {-1, width});
}

inline void* pointer(const Tensor& tensor) { return tensor.numel() ? tensor.data_ptr() : nullptr; }

inline const void* pointer(const MaybeTensor& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

inline const uint8_t* bytes(const Tensor& mask) { return static_cast<const uint8_t*>(mask.data_ptr()); }

// A tensor that is changed in place, as contiguous memory. Any other tensor is copied, and the copy is written back at
// the end.
class InPlace {
 public:
  explicit InPlace(const Tensor& tensor) : tensor_(tensor), dense_(dense(tensor)) {}
  InPlace(const InPlace&) = delete;
  InPlace& operator=(const InPlace&) = delete;
  ~InPlace() noexcept(false) {
    if (copied()) copy_into(tensor_, dense_);
  }

  void* data() const { return pointer(dense_); }
  bool copied() const { return dense_.get() != tensor_.get(); }

 private:
  Tensor tensor_, dense_;
};

// `base` moved by `elements` of `dtype`; null stays null.
template <typename Pointer>
Pointer* advanced(Pointer* base, int64_t elements, Dtype dtype) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  return base ? static_cast<Byte*>(base) + elements * element_size(dtype) : nullptr;
}

// A tensor (..., K) as rows of K elements: without a copy if its leading axes amount to two with any strides.
class RowsOf {
 public:
  explicit RowsOf(const Tensor& tensor) : tensor_(tensor) {
    if (!fill()) {
      tensor_ = dense(tensor);
      fill();
    }
  }

  const Rows& rows() const { return rows_; }

 private:
  bool fill() {
    const Sizes sizes = tensor_.sizes(), strides = tensor_.strides();
    const std::size_t last = sizes.size() - 1;
    if (sizes[last] > 1 && strides[last] != 1) return false;
    rows_ = Rows{pointer(tensor_), 1, 0, 0};
    int axes = 0;
    int64_t size = 1, stride = 0;  // of the axis that grows, from the innermost outwards
    for (std::size_t axis = last; axis-- > 0;) {
      if (sizes[axis] == 1) continue;
      if (axes > 0 && strides[axis] == size * stride) {
        size *= sizes[axis];
      } else {
        if (axes == 1) rows_.inner = size, rows_.inner_stride = stride;
        if (++axes > 2) return false;
        size = sizes[axis], stride = strides[axis];
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
