// The rows of a tensor, and the type of its elements.
#pragma once

#include "../arguments.h"
#include "simd.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

template <class Element>
TLCR_INLINE Element* row_of(const Rows& rows, int64_t row) {
  Element* const data = static_cast<Element*>(rows.data);
  if (row < rows.inner) return data + row * rows.inner_stride;  // a division takes as long as a short row
  return data + row / rows.inner * rows.outer_stride + row % rows.inner * rows.inner_stride;
}

// Calls use(type) with a value of the element's type.
template <class Use>
TLCR_INLINE void with_type(Type type, Use use) {
  switch (type) {
    case Type::kFloat: return use(float());  // NOLINT(bugprone-branch-clone): use(float()) is not use(double())
    case Type::kDouble: return use(double());
    case Type::kBFloat16: return use(BFloat16());
    case Type::kHalf: return use(Half());
  }
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
