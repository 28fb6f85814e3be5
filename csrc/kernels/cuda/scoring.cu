// Log-probability, entropy and KL of tokens from logits, and their gradient.
//
// Both kernels are bound by device memory. The forward pass moves rows * vocabulary * sizeof(T) bytes per logits tensor
// and a few numbers per row; the backward pass reads each logits tensor that takes part once and writes as much. So a
// thread moves 16 bytes at a time and has several loads under way before it uses the first.
#include "kernels.h"
#include "softmax.cuh"

namespace tlcr::cuda {
namespace {

// Threads that share a row: a warp where the row is so short that a block would spend most of its time at barriers.
constexpr int kShortRow = 2048;
constexpr int kRowThreads = 256;
constexpr int kShortRowsPerBlock = 4;
// Number of blocks that the registers of a multiprocessor must have room for, so that one block reads while another
// adds up the sums of its threads.
template <typename T>
constexpr int kBlocks = sizeof(T) == sizeof(double) ? 1 : 3;

// Number of loads that a thread has in flight, for all tensors together.
constexpr int kLoads = 4;

// In the backward pass a row is divided into segments among blocks, so that a few long rows also use the whole device.
constexpr int kSegmentThreads = 256;
constexpr int kSegmentPacks = 16 * kSegmentThreads;

constexpr int64_t blocks_for(int64_t n, int64_t per_block) { return (n + per_block - 1) / per_block; }

template <typename real>
struct Temperature {
  real inverse, scale;

  __device__ __forceinline__ Temperature(const void* temperatures, double temperature, int64_t row)
      : inverse(1 / element_or<real>(temperatures, row, static_cast<real>(temperature))),
        scale(static_cast<real>(kLog2E) * inverse) {}
};

// The sums over the part of a row that this thread, `rank` of kThreads, reads. The part depends on the row's length
// only. kAligned: packs counted from the begin of x, and of y, are aligned.
template <typename T, int kThreads, bool kReference, bool kAligned>
__device__ __forceinline__ RowSums<Real<T>, kReference> sum_row(const T* x, const T* y, int vocabulary, int rank,
                                                                Real<T> scale) {
  using real = Real<T>;
  using Sums = RowSums<real, kReference>;
  constexpr int kPacks = kReference ? kLoads / 2 : kLoads;
  constexpr int kStep = kPacks * kThreads;
  const int packs = vocabulary / kPack<T>;
  Sums sums = Sums::empty();

  if (const int column = packs * kPack<T> + rank; column < vocabulary) {
    const real x_edge[1] = {to_real(x[column])};
    const real y_edge[1] = {kReference ? to_real(y[column]) : 0};
    sums.add(x_edge, y_edge, scale);
  }

  const auto add_tile = [&](int first, auto is_there) {
    Pack<T> x_packs[kPacks];
    [[maybe_unused]] Pack<T> y_packs[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int pack = first + k * kThreads;
      if (!is_there(pack)) continue;
      x_packs[k] = load_pack_of<T, kAligned>(x, pack, packs);
      if constexpr (kReference) y_packs[k] = load_pack_of<T, kAligned>(y, pack, packs);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!is_there(first + k * kThreads)) continue;
      real x_k[kPack<T>], y_k[kPack<T>];
      unpack(x_packs[k], x_k);
      if constexpr (kReference) unpack(y_packs[k], y_k);
      sums.add(x_k, y_k, scale);
    }
  };

  int pack = rank;
  for (; pack + kStep - kThreads < packs; pack += kStep) add_tile(pack, [](int) { return true; });
  if (pack < packs) add_tile(pack, [&](int k) { return k < packs; });
  return sums;
}

template <typename T, int kThreads, bool kReference>
__global__ void __launch_bounds__(kThreads == kWarp ? kWarp * kShortRowsPerBlock : kThreads, kBlocks<T>)
    score_kernel(const ScoreArguments a) {
  using real = Real<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreads) + threadIdx.x / kThreads;
  const int rank = threadIdx.x % kThreads;
  if (row >= a.rows) return;

  const int vocabulary = static_cast<int>(a.vocabulary);
  const T* x = row_begin<const T>(a.logits, row);
  const T* y = kReference ? row_begin<const T>(a.ref_logits, row) : nullptr;
  const Temperature<real> temperature(a.temperatures, a.temperature, row);
  RowSums<real, kReference> sums;
  if (is_aligned<kPack<T>>(x) && (!kReference || is_aligned<kPack<T>>(y))) {
    sums = sum_row<T, kThreads, kReference, true>(x, y, vocabulary, rank, temperature.scale);
  } else {
    sums = sum_row<T, kThreads, kReference, false>(x, y, vocabulary, rank, temperature.scale);
  }
  sums = merge_threads<kThreads>(sums, temperature.scale);
  if (rank != 0) return;

  const int64_t token = a.token_ids[row];
  require(token >= 0 && token < a.vocabulary);
  const real log_sum = log(sums.sum);
  static_cast<real*>(a.logprobs)[row] = (to_real(x[token]) - sums.max) * temperature.inverse - log_sum;
  static_cast<real*>(a.entropy)[row] = sums.entropy(temperature.inverse);
  static_cast<real*>(a.stats)[2 * row] = sums.max;
  static_cast<real*>(a.stats)[2 * row + 1] = log_sum;
  if constexpr (kReference) {
    static_cast<real*>(a.ref_logprobs)[row] =
        (to_real(y[token]) - sums.ref_max) * temperature.inverse - log(sums.ref_sum);
    const real kl = sums.kl(temperature.scale, temperature.inverse);
    static_cast<real*>(a.kl)[row] = kl;
    static_cast<real*>(a.ref_stats)[2 * row] = sums.ref_at_max;
    // If the KL is infinite or NaN, every gradient of it must be infinite or NaN too.
    static_cast<real*>(a.ref_stats)[2 * row + 1] = isfinite(kl) ? sums.cross / sums.sum : kl;
  }
}

// Everything that the gradient at the entries of a row needs. With x and y logits,
//
//     log p = (x - max) / temperature - log_sum
//     log p - log q - KL = ((x - max) - (y - ref_at_max) - mean_difference) / temperature
//
// where ref_at_max is the y of the largest x. The second formula is computed as written, because its terms are exactly
// 0 at that entry. A row without another likely entry has its whole gradient there, and log-probabilities and KL would
// each add a rounding error. The forward pass leaves stats = {max, log_sum} and ref_stats = {ref_at_max,
// mean_difference}.
template <typename real>
struct RowGradient {
  real inverse_temperature;
  real max, log_sum, entropy, ref_at_max, mean_difference;
  real g_logprob, g_entropy, g_kl;

  __device__ __forceinline__ RowGradient(const ScoreBackwardArguments& a, int64_t row)
      : inverse_temperature(Temperature<real>(a.temperatures, a.temperature, row).inverse),
        g_logprob(element_or<real>(a.g_logprobs, row, 0)),
        g_entropy(element_or<real>(a.g_entropy, row, 0)),
        g_kl(element_or<real>(a.g_kl, row, 0)) {
    max = static_cast<const real*>(a.stats)[2 * row];
    log_sum = static_cast<const real*>(a.stats)[2 * row + 1];
    // A result without a gradient may be infinite or NaN and yet adds exactly 0.
    entropy = g_entropy != 0 ? static_cast<const real*>(a.entropy)[row] : 0;
    if (g_kl != 0) {
      ref_at_max = static_cast<const real*>(a.ref_stats)[2 * row];
      mean_difference = static_cast<const real*>(a.ref_stats)[2 * row + 1];
    }
  }

  __device__ __forceinline__ bool is_zero() const { return g_logprob == 0 && g_entropy == 0 && g_kl == 0; }

  // At the entry with logits x and y.
  template <bool kKL>
  __device__ __forceinline__ real at(real x, real y, bool is_token) const {
    const real log_p = fma(x - max, inverse_temperature, -log_sum);
    const real p = exp2_of(log_p * static_cast<real>(kLog2E));
    real factor = fma(-g_entropy, log_p + entropy, -g_logprob);
    if constexpr (kKL) {
      // kKL is true only where g_kl is not 0, and then the constructor has read both.
      // NOLINTNEXTLINE(clang-analyzer-core.UndefinedBinaryOperatorResult)
      const real difference = (x - max) - (y - ref_at_max);
      factor = fma(g_kl * inverse_temperature, difference - mean_difference, factor);
    }
    const real own = is_token ? g_logprob : 0;
    return (p == 0 ? own : fma(p, factor, own)) * inverse_temperature;
  }
};

// Writes the gradient of the packs [first, last) of a row, and of its edges if `with_edges`. y and the result are
// accessed in packs only if those of x are packs of them too.
template <typename T, typename G, int kThreads, bool kKL, bool kAligned>
__device__ __forceinline__ void write_gradient(const RowGradient<Real<T>>& gradient, const T* x, const T* y, G* out,
                                               const Cut<T>& cut, int token, int first, int last, bool with_edges,
                                               int rank) {
  using real = Real<T>;
  constexpr int kPacks = kKL ? kLoads / 2 : kLoads;

  if (with_edges && rank < cut.edges) {
    const int column = cut.edge(rank);
    const real y_edge = kKL ? to_real(y[column]) : 0;
    out[column] = from_real<G>(gradient.template at<kKL>(to_real(x[column]), y_edge, column == token));
  }

  for (int tile = first + rank; tile < last; tile += kPacks * kThreads) {
    Pack<T> x_packs[kPacks];
    [[maybe_unused]] Pack<T> y_packs[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int pack = tile + k * kThreads;
      if (pack >= last) continue;
      const int column = cut.head + pack * kPack<T>;
      x_packs[k] = load_pack(x + column, true);
      if constexpr (kKL) y_packs[k] = load_pack(y + column, kAligned);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int pack = tile + k * kThreads;
      if (pack >= last) continue;
      const int column = cut.head + pack * kPack<T>;
      real x_k[kPack<T>], y_k[kPack<T>];
      unpack(x_packs[k], x_k);
      if constexpr (kKL) unpack(y_packs[k], y_k);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        x_k[i] = gradient.template at<kKL>(x_k[i], kKL ? y_k[i] : 0, column + i == token);
      }
      store_pack(out + column, pack_of<G>(x_k), kAligned);
    }
  }
}

template <typename T, int kThreads>
__device__ __forceinline__ void write_zeros(T* out, int vocabulary, int segment, int segments, int rank) {
  const Cut<T> cut(out, vocabulary);
  if (segment == 0 && rank < cut.edges) out[cut.edge(rank)] = from_real<T>(0);
  const Real<T> zeros[kPack<T>] = {};
  for (int pack = segment * kThreads + rank; pack < cut.packs; pack += segments * kThreads) {
    store_pack(out + cut.head + pack * kPack<T>, pack_of<T>(zeros), true);
  }
}

// A row's segments; the same number for all rows of a launch.
template <typename T>
constexpr __host__ __device__ int segments_of(int64_t vocabulary) {
  return static_cast<int>((vocabulary / kPack<T> + kSegmentPacks) / kSegmentPacks);
}

// T is the type of the logits and G of their gradient.
template <typename T, typename G, int kThreads, bool kReference>
__global__ void __launch_bounds__(kThreads == kWarp ? kWarp * kShortRowsPerBlock : kThreads, kBlocks<T>)
    score_backward_kernel(const ScoreBackwardArguments a) {
  using real = Real<T>;
  const int rank = threadIdx.x % kThreads;
  const int segments = kThreads == kWarp ? 1 : segments_of<T>(a.vocabulary);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreads) + threadIdx.x / kThreads;
  const int64_t row = item / segments;
  const int segment = static_cast<int>(item % segments);
  if (row >= a.rows) return;

  const int vocabulary = static_cast<int>(a.vocabulary);
  G* out = row_begin<G>(a.grad_logits, row);
  const RowGradient<real> gradient(a, row);
  if (gradient.is_zero()) {
    write_zeros<G, kThreads>(out, vocabulary, segment, segments, rank);
    return;
  }

  const T* x = row_begin<const T>(a.logits, row);
  const int64_t token_column = a.token_ids[row] - a.first_entry;
  const int token = token_column >= 0 && token_column < vocabulary ? static_cast<int>(token_column) : -1;
  const Cut<T> cut(x, vocabulary);
  const int first = segments == 1 ? 0 : segment * kSegmentPacks;
  const int last = segments == 1 || cut.packs - first < kSegmentPacks ? cut.packs : first + kSegmentPacks;
  const bool with_edges = segment == 0, out_is_aligned = is_aligned<kPack<T>>(out + cut.head);
  if (kReference && gradient.g_kl != 0) {
    const T* y = row_begin<const T>(a.ref_logits, row);
    if (out_is_aligned && is_aligned<kPack<T>>(y + cut.head)) {
      write_gradient<T, G, kThreads, true, true>(gradient, x, y, out, cut, token, first, last, with_edges, rank);
    } else {
      write_gradient<T, G, kThreads, true, false>(gradient, x, y, out, cut, token, first, last, with_edges, rank);
    }
  } else if (out_is_aligned) {
    write_gradient<T, G, kThreads, false, true>(gradient, x, nullptr, out, cut, token, first, last, with_edges, rank);
  } else {
    write_gradient<T, G, kThreads, false, false>(gradient, x, nullptr, out, cut, token, first, last, with_edges, rank);
  }
}

template <typename T, bool kReference>
cudaError_t launch_score(const ScoreArguments& a, cudaStream_t stream) {
  if (a.vocabulary <= kShortRow) {
    return launch(score_kernel<T, kWarp, kReference>, blocks_for(a.rows, kShortRowsPerBlock),
                  kShortRowsPerBlock * kWarp, stream, a);
  }
  return launch(score_kernel<T, kRowThreads, kReference>, a.rows, kRowThreads, stream, a);
}

template <typename T, typename G, bool kReference>
cudaError_t launch_score_backward(const ScoreBackwardArguments& a, cudaStream_t stream) {
  if (a.vocabulary <= kShortRow) {
    return launch(score_backward_kernel<T, G, kWarp, kReference>, blocks_for(a.rows, kShortRowsPerBlock),
                  kShortRowsPerBlock * kWarp, stream, a);
  }
  return launch(score_backward_kernel<T, G, kSegmentThreads, kReference>, a.rows * segments_of<T>(a.vocabulary),
                kSegmentThreads, stream, a);
}

}  // namespace

cudaError_t score(const ScoreArguments& a, cudaStream_t stream) {
  if (a.vocabulary < 1 || a.vocabulary > INT32_MAX) return cudaErrorInvalidValue;
  return with_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    return a.ref_logits.data == nullptr ? launch_score<T, false>(a, stream) : launch_score<T, true>(a, stream);
  });
}

cudaError_t score_backward(const ScoreBackwardArguments& a, cudaStream_t stream) {
  if (a.vocabulary < 1 || a.vocabulary > INT32_MAX) return cudaErrorInvalidValue;
  const auto launch_with = [&](auto logit, auto gradient) {
    using T = decltype(logit);
    using G = decltype(gradient);
    return a.g_kl == nullptr ? launch_score_backward<T, G, false>(a, stream)
                             : launch_score_backward<T, G, true>(a, stream);
  };
  return with_type(a.grad_type, [&](auto gradient) {
    using G = decltype(gradient);
    return a.type == a.grad_type ? launch_with(gradient, gradient) : launch_with(Real<G>{}, gradient);
  });
}

}  // namespace tlcr::cuda
