// Runs a kernel on the device of its tensors: over threads on the CPU, on the device's current stream with CUDA.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>

#include "kernels/cpu/kernels.h"
#include "tensors.h"

#ifdef TLCR_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/cuda/kernels.h"
#endif

namespace tlcr {

inline const cpu::Kernels& cpu_kernels() {
  static const cpu::Kernels& table = cpu::kernels(at::get_cpu_capability().c_str());
  return table;
}

// Number of elements that justify one more thread.
constexpr int64_t kGrain = 32768;

// Divides rows of `width` elements among the threads. A row is never split, so the number of threads changes no result.
template <typename Arguments>
void on_threads(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int64_t rows,
                int64_t width) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

#ifdef TLCR_CUDA
// On the current stream of the device that holds `like`.
template <typename Arguments>
void on_stream(cudaError_t (*kernel)(const Arguments&, cudaStream_t), const Tensor& like, const Arguments& arguments) {
  const c10::cuda::CUDAGuard device(like.device());
  C10_CUDA_CHECK(kernel(arguments, c10::cuda::getCurrentCUDAStream()));
}
#endif

inline void run_score([[maybe_unused]] const Tensor& like, const ScoreArguments& arguments) {
#ifdef TLCR_CUDA
  if (like.is_cuda()) return on_stream(cuda::score, like, arguments);
#endif
  on_threads(cpu_kernels().score, arguments, arguments.rows, arguments.vocabulary);
}

inline void run_score_backward([[maybe_unused]] const Tensor& like, const ScoreBackwardArguments& arguments) {
#ifdef TLCR_CUDA
  if (like.is_cuda()) return on_stream(cuda::score_backward, like, arguments);
#endif
  on_threads(cpu_kernels().score_backward, arguments, arguments.rows, arguments.vocabulary);
}

inline void run_hidden_reward([[maybe_unused]] const Tensor& like, const HiddenRewardArguments& arguments) {
#ifdef TLCR_CUDA
  if (like.is_cuda()) return on_stream(cuda::hidden_reward, like, arguments);
#endif
  on_threads(cpu_kernels().hidden_reward, arguments, arguments.batch, arguments.length * arguments.width);
}

}  // namespace tlcr
