// Reads and writes a row of tokens one register at a time: in whole blocks, and in a shorter block at the end.
#pragma once

#include "simd.h"

namespace tlcr::cpu::TLCR_ISA {
namespace {

// All bits of a lane are set if the lane is chosen, as comparisons set them.
template <class Real>
using Mask = Vector<typename Exponential<Real>::Integer>;

template <class Real>
TLCR_INLINE Mask<Real> all_lanes() {
  return ~Mask<Real>{};
}

// A constant with of(lane) in every lane, to shuffle by.
template <int... kLane>
struct Lanes {};

template <class Real, class Of, int... kLane>
TLCR_INLINE Mask<Real> lane_table(Of of, Lanes<kLane...>) {
  return Mask<Real>{of(kLane)...};
}

#if defined(__clang__)  // clang-tidy reads this file with clang
template <class, int... kLane>
using LanesOf = Lanes<kLane...>;
template <int kCount>
using LanesBelow = __make_integer_seq<LanesOf, int, kCount>;
#else
template <int kCount>
using LanesBelow = Lanes<__integer_pack(kCount)...>;
#endif

template <class Real, class Of>
TLCR_INLINE Mask<Real> lane_table(Of of) {
  return lane_table<Real>(of, LanesBelow<kLanes<Real>>());
}

// Makes a mask from bytes that are 0 or 1. Without this code the compiler would widen them one by one.
#if TLCR_VECTOR_BYTES == 64
TLCR_INLINE Mask<float> load_mask(const uint8_t* from, float) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return bit_cast<Mask<float>>(_mm512_maskz_cvtepu8_epi32(-1, bytes)) != 0;
}
TLCR_INLINE Mask<double> load_mask(const uint8_t* from, double) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return bit_cast<Mask<double>>(_mm512_maskz_cvtepu8_epi64(-1, bytes)) != 0;
}
#elif TLCR_VECTOR_BYTES == 32
TLCR_INLINE Mask<float> load_mask(const uint8_t* from, float) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return bit_cast<Mask<float>>(_mm256_cvtepu8_epi32(bytes)) != 0;
}
TLCR_INLINE Mask<double> load_mask(const uint8_t* from, double) {
  int32_t bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return bit_cast<Mask<double>>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes))) != 0;
}
#else
template <class Real>
TLCR_INLINE Mask<Real> load_mask(const uint8_t* from, Real) {
  Mask<Real> mask;
  for (int lane = 0; lane < kLanes<Real>; ++lane) mask[lane] = -from[lane];
  return mask;
}
#endif

// A block of kLanes<Real> tokens that begins at `begin`.
template <class Real>
struct WholeBlock {
  int64_t begin;

  // Registers of a row that holds kPerToken elements for every token.
  template <int kPerToken = 1, class Element>
  TLCR_INLINE Vector<Real> read(const Element* row, int i = 0) const {
    return load(row + kPerToken * begin + i * kLanes<Real>);
  }
  // Where tokens count; everywhere if there is no mask.
  TLCR_INLINE Mask<Real> counts(const uint8_t* mask) const {
    return mask == nullptr ? all_lanes<Real>() : load_mask(mask + begin, Real());
  }
  template <class Element>
  TLCR_INLINE void write(Element* row, Vector<Real> x) const {
    store(row + begin, x);
  }
};

// A block of `size` tokens that begins at `begin`, fewer than there are lanes. The lanes beyond them read as 0, do not
// count and are not written.
template <class Real>
struct PartBlock {
  int64_t begin;
  int size;

  template <int kPerToken = 1, class Element>
  TLCR_INLINE Vector<Real> read(const Element* row, int i = 0) const {
    Element lanes[kLanes<Real>] = {};
    const int elements = kPerToken * size - i * kLanes<Real>;
    for (int lane = 0; lane < kLanes<Real> && lane < elements; ++lane) {
      lanes[lane] = row[kPerToken * begin + i * kLanes<Real> + lane];
    }
    return load(lanes);
  }
  TLCR_INLINE Mask<Real> counts(const uint8_t* mask) const {
    uint8_t lanes[kLanes<Real>] = {};
    for (int lane = 0; lane < size; ++lane) lanes[lane] = mask == nullptr ? 1 : mask[begin + lane];
    return load_mask(lanes, Real());
  }
  template <class Element>
  TLCR_INLINE void write(Element* row, Vector<Real> x) const {
    Element lanes[kLanes<Real>];
    store(lanes, x);
    for (int lane = 0; lane < size; ++lane) row[begin + lane] = lanes[lane];
  }
};

// Calls use(block) for the blocks of [begin, end) in their order.
template <class Real, class Use>
TLCR_INLINE void for_each_block(int64_t begin, int64_t end, Use use) {
  int64_t at = begin;
  for (; at + kLanes<Real> <= end; at += kLanes<Real>) use(WholeBlock<Real>{at});
  if (at < end) use(PartBlock<Real>{at, static_cast<int>(end - at)});
}

// Calls use(begin, end) for stretches of [begin, end). Each is so short that sums over it may be held in Real, lane by
// lane.
template <class Real, class Use>
TLCR_INLINE void for_each_stretch(int64_t begin, int64_t end, Use use) {
  constexpr int64_t kTokens = 32 * kLanes<Real>;
  for (int64_t at = begin; at < end; at += kTokens) use(at, at + kTokens < end ? at + kTokens : end);
}

}  // namespace
}  // namespace tlcr::cpu::TLCR_ISA
