// Where a row of a tensor begins.
#pragma once

#include "../arguments.h"
#include "simd.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

template <class Element>
TLCR_INLINE Element* row_of(const Rows& rows, int64_t row) {
  return static_cast<Element*>(rows.data) + row / rows.inner * rows.outer_stride + row % rows.inner * rows.inner_stride;
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
