// The sums over a row of logits from which its log-probabilities, entropy and KL are computed, gathered in one pass.
#pragma once

#include <cmath>
#include <limits>

#include "memory.cuh"

namespace tlcr::cuda {

constexpr double kLog2E = 1.4426950408889634;

// Sums of a part of a row; x are logits of the policy, y of the reference, e = exp((x - max) / temperature).
//
// Everything is summed over differences from the largest entry so far, which are exact for logits near it. Sums over
// the raw logits would lose the digits that those need for a common offset. Once per pack, the earlier sums are
// converted to the new maximum. `scale`, an argument throughout, is log2(e) / temperature.
//
// An entry with e == 0 adds nothing, so that -inf in x and y needs no special case. An entry where only y is -inf makes
// the KL infinite, unless its e is 0 for the maximum of the whole row. That maximum is not known while a part of the
// row is read, so the largest such x is kept.
template <typename real, bool kReference>
struct RowSums {
  real max, sum, weighted;  // weighted = sum of e (x - max)
  real ref_max, ref_sum;    // of the reference by itself
  real ref_at_max, cross;   // cross = sum of e ((x - max) - (y - ref_at_max))
  real excluded;            // the largest x where y = -inf

  // Lower than or equal to every finite logit, and finite, so that it can be subtracted from.
  static constexpr real kLowest = std::numeric_limits<real>::lowest();
  static constexpr real kInfinity = std::numeric_limits<real>::infinity();

  static __device__ __forceinline__ RowSums empty() { return {kLowest, 0, 0, kLowest, 0, 0, 0, -kInfinity}; }

  // Converts the sums to another maximum, no lower than their own, and to the reference's logit there.
  __device__ __forceinline__ void move_to(real new_max, real new_ref_at_max, real new_ref_max, real scale) {
    const real shift = max - new_max;
    const real factor = exp2_of(shift * scale);
    sum *= factor;
    // Nothing seen yet, or nothing that still counts: `shift` may be infinite.
    const bool counts = sum != 0;
    weighted = counts ? fma(factor, weighted, sum * shift) : 0;
    max = new_max;
    if constexpr (kReference) {
      cross = counts ? fma(factor, cross, sum * (shift - (ref_at_max - new_ref_at_max))) : 0;
      ref_at_max = new_ref_at_max;
      ref_sum *= exp2_of((ref_max - new_ref_max) * scale);
      ref_max = new_ref_max;
    }
  }

  template <int kCount>
  __device__ __forceinline__ void add(const real (&x)[kCount], const real (&y)[kCount], real scale) {
    real top = max, ref_at_top = ref_at_max, ref_top = ref_max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      top = fmax(top, x[i]);
      if constexpr (kReference) ref_top = fmax(ref_top, y[i]);
    }
    if constexpr (kReference) {
      if (top > max) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (x[i] == top) ref_at_top = y[i];
        }
        if (ref_at_top == -kInfinity) ref_at_top = 0;  // any finite number: the KL is infinite then
      }
    }
    move_to(top, ref_at_top, ref_top, scale);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const real difference = x[i] - max;
      const real e = exp2_of(difference * scale);
      const bool counts = e != 0;  // true for a NaN
      sum += e;
      if (counts) weighted = fma(e, difference, weighted);
      if constexpr (kReference) {
        const bool excludes = y[i] == -kInfinity;
        ref_sum += exp2_of((y[i] - ref_max) * scale);
        if (counts && !excludes) cross = fma(e, difference - (y[i] - ref_at_max), cross);
        if (excludes) excluded = fmax(excluded, x[i]);
      }
    }
  }

  __device__ __forceinline__ void merge(RowSums other, real scale) {
    const real top = fmax(max, other.max), ref_top = fmax(ref_max, other.ref_max);
    const real ref_at_top = other.max > max ? other.ref_at_max : ref_at_max;
    move_to(top, ref_at_top, ref_top, scale);
    other.move_to(top, ref_at_top, ref_top, scale);
    sum += other.sum;
    weighted += other.weighted;
    if constexpr (kReference) {
      ref_sum += other.ref_sum;
      cross += other.cross;
      excluded = fmax(excluded, other.excluded);
    }
  }

  // The sums of the lane whose number differs in the bit `lanes`.
  __device__ __forceinline__ RowSums from_lane_across(int lanes) const {
    RowSums other = empty();
    other.max = __shfl_xor_sync(kAllLanes, max, lanes);
    other.sum = __shfl_xor_sync(kAllLanes, sum, lanes);
    other.weighted = __shfl_xor_sync(kAllLanes, weighted, lanes);
    if constexpr (kReference) {
      other.ref_max = __shfl_xor_sync(kAllLanes, ref_max, lanes);
      other.ref_sum = __shfl_xor_sync(kAllLanes, ref_sum, lanes);
      other.ref_at_max = __shfl_xor_sync(kAllLanes, ref_at_max, lanes);
      other.cross = __shfl_xor_sync(kAllLanes, cross, lanes);
      other.excluded = __shfl_xor_sync(kAllLanes, excluded, lanes);
    }
    return other;
  }

  // Merges the sums of the first kLanes lanes into lane 0.
  template <int kLanes>
  __device__ __forceinline__ void merge_lanes(real scale) {
#pragma unroll 1  // runs once per row: unrolling it is not worth the code size
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) merge(from_lane_across(lanes), scale);
  }

  __device__ __forceinline__ real entropy(real inverse_temperature) const {
    return log(sum) - inverse_temperature * (weighted / sum);
  }

  __device__ __forceinline__ real kl(real scale, real inverse_temperature) const {
    // The quotient, because the difference of two logarithms loses the digits of a small KL.
    const real finite = inverse_temperature * (cross / sum + (ref_max - ref_at_max)) + log(ref_sum / sum);
    // Added and not assigned: a row that is NaN stays NaN.
    return finite + (exp2_of((excluded - max) * scale) != 0 ? kInfinity : 0);
  }
};

// Merges the sums of the kThreads threads that share a row (whole warps) in a fixed order; the first thread has the
// result. What a thread sums is fixed too: it depends on the row's length alone.
template <int kThreads, typename Sums, typename real>
__device__ __forceinline__ Sums merge_threads(Sums sums, real scale) {
  sums.template merge_lanes<kWarp>(scale);
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ Sums of_warp[kWarps];
    const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
    if (lane == 0) of_warp[warp] = sums;
    __syncthreads();
    if (warp == 0) {
      sums = lane < kWarps ? of_warp[lane] : Sums::empty();
      sums.template merge_lanes<kWarps>(scale);
    }
  }
  return sums;
}

}  // namespace tlcr::cuda
