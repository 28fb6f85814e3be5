// The discriminator's head, its softmax and the mapping to rewards, in one read of the hidden states.
//
// Bound by device memory: counted tokens * width * sizeof(T) bytes. Every warp reads the weight, two or three rows of
// `width`, which stay in the first-level cache because the hidden states are kept from filling it; a warp takes several
// tokens at a time so that one read of the weight serves them all. No sum depends on which tokens share a warp.
#include <cmath>

#include "kernels.h"
#include "memory.cuh"

namespace tlcr::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTokens = 2;  // that a warp takes at a time
constexpr int kTokensPerBlock = kWarps * kTokens;
// Number of blocks that the registers of a multiprocessor must have room for: that many warps hide the latency of
// device memory.
template <typename T>
constexpr int kBlocks = sizeof(T) == sizeof(double) ? 1 : 6;

// A pack of hidden states, or its first `count` elements with zeros behind them. kAligned: to 16 bytes, and whole.
template <bool kAligned, typename T, typename real>
__device__ __forceinline__ void load_hidden(const T* from, int count, real (&to)[kPack<T>]) {
  if constexpr (kAligned) {
    unpack(load_pack(from, true), to);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) to[i] = i < count ? to_real(from[i]) : 0;
  }
}

// As many elements of the weight.
template <bool kAligned, int kCount, typename real>
__device__ __forceinline__ void load_weight(const real* from, int count, real (&to)[kCount]) {
  if constexpr (kAligned) {
    static_assert(kCount % kPack<real> == 0, "whole packs");
#pragma unroll
    for (int k = 0; k < kCount; k += kPack<real>) {
      const auto pack = bits_as<Pack<real>>(__ldg(reinterpret_cast<const uint4*>(from + k)));
#pragma unroll
      for (int i = 0; i < kPack<real>; ++i) to[k + i] = pack.element[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < count ? __ldg(from + i) : 0;
  }
}

// Whether no token of [begin, end) counts; all lanes of the warp call this together. For a whole row of the batch this
// reads its mask once more: a token that counts searches only up to the next one that does.
__device__ __forceinline__ bool none_counts(const uint8_t* mask, int64_t begin, int64_t end) {
  constexpr int kReads = 8 * kWarp;
  for (int64_t at = begin; at < end; at += kReads) {
    bool any = false;
#pragma unroll
    for (int k = 0; k < kReads; k += kWarp) {
      const int64_t position = at + k + threadIdx.x % kWarp;
      any |= position < end && mask[position] != 0;
    }
    if (__any_sync(kAllLanes, any)) return false;
  }
  return true;
}

template <int kClasses, typename real>
__device__ __forceinline__ real reward_of(const real (&logits)[kClasses], const RewardOptions& options) {
  real x[kClasses];
#pragma unroll
  for (int c = 0; c < kClasses; ++c) x[c] = logits[c] / static_cast<real>(options.temperature);
  real max = x[0];
#pragma unroll
  for (int c = 1; c < kClasses; ++c) max = fmax(max, x[c]);
  real sum = 0;
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
    x[c] = exp(x[c] - max);
    sum += x[c];
  }
  real confidence = x[kClasses - 1] / sum - x[0] / sum;
  if (options.discrete) {
    const real band = static_cast<real>(options.band);
    const real undecided = isnan(confidence) ? confidence : real(0);
    confidence = confidence > band ? real(1) : confidence < -band ? real(-1) : undecided;
  }
  // Comparisons instead of fmin and fmax, which would turn a NaN into a number.
  const real reward = static_cast<real>(options.scale) * confidence, clip = static_cast<real>(options.clip);
  return reward > clip ? clip : reward < -clip ? -clip : reward;
}

// A lane takes every 32nd pack, wherever a row begins, so that the order of a sum depends on the width alone. kAligned:
// all packs of rows and weight are aligned and whole, and each is read at once.
template <typename T, int kClasses, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) hidden_reward_kernel(const HiddenRewardArguments a) {
  using real = Real<T>;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t tokens = a.batch * a.length;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kTokens;

  bool counts[kTokens];
  const T* hidden[kTokens];
  real sums[kTokens][kClasses];
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    counts[k] = first + k < tokens && a.mask[first + k] != 0;
    hidden[k] = counts[k] ? row_begin<const T>(a.hidden, first + k) : nullptr;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) sums[k][c] = 0;
  }

  const real* weight = static_cast<const real*>(a.weight);
  const int width = static_cast<int>(a.width);
#pragma unroll 2
  for (int column = lane * kPack<T>; column < width; column += kWarp * kPack<T>) {
    real h[kTokens][kPack<T>];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (counts[k]) load_hidden<kAligned>(hidden[k] + column, width - column, h[k]);
    }
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      real w[kPack<T>];
      load_weight<kAligned>(weight + static_cast<int64_t>(c) * width + column, width - column, w);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        if (!counts[k]) continue;
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) sums[k][c] = fma(h[k][i], w[i], sums[k][c]);
      }
    }
  }

  real* rewards = static_cast<real*>(a.rewards);
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    const int64_t token = first + k;
    if (!counts[k]) {
      if (lane == 0 && token < tokens) rewards[token] = 0;
      continue;
    }
    real logits[kClasses];
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      logits[c] = sums[k][c];
#pragma unroll
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) logits[c] += __shfl_xor_sync(kAllLanes, logits[c], lanes);
      logits[c] += element_or<real>(a.bias, c, 0);
    }
    const int64_t row = token / a.length;
    const bool is_last = a.terminal != nullptr && none_counts(a.mask, token + 1, (row + 1) * a.length);
    if (lane != 0) continue;
    real reward = reward_of(logits, a.options);
    if (a.options.kl_coef != 0) {
      reward -= static_cast<real>(a.options.kl_coef) * static_cast<const real*>(a.kl)[token];
    }
    if (is_last) reward += static_cast<const real*>(a.terminal)[row];
    rewards[token] = reward;
  }
}

template <typename T>
bool packs_are_aligned(const HiddenRewardArguments& a) {
  const bool bases = reinterpret_cast<uintptr_t>(a.hidden.data) % sizeof(uint4) == 0 &&
                     reinterpret_cast<uintptr_t>(a.weight) % sizeof(uint4) == 0;
  return bases && a.width % kPack<T> == 0 && a.hidden.outer_stride % kPack<T> == 0 &&
         a.hidden.inner_stride % kPack<T> == 0;
}

template <typename T, int kClasses>
cudaError_t launch_hidden_reward(const HiddenRewardArguments& a, cudaStream_t stream) {
  const int64_t blocks = (a.batch * a.length + kTokensPerBlock - 1) / kTokensPerBlock;
  const auto kernel =
      packs_are_aligned<T>(a) ? hidden_reward_kernel<T, kClasses, true> : hidden_reward_kernel<T, kClasses, false>;
  return launch(kernel, blocks, kThreads, stream, a);
}

}  // namespace

cudaError_t hidden_reward(const HiddenRewardArguments& a, cudaStream_t stream) {
  if (a.width < 0 || a.width > INT32_MAX || (a.classes != 2 && a.classes != 3)) return cudaErrorInvalidValue;
  return with_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    return a.classes == 2 ? launch_hidden_reward<T, 2>(a, stream) : launch_hidden_reward<T, 3>(a, stream);
  });
}

}  // namespace tlcr::cuda
