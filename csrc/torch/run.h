// Runs a kernel on the device of its tensors: over threads on the CPU, on the device's current stream with CUDA.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "kernels/cpu/kernels.h"
#include "tensors.h"

#ifdef TLCR_CUDA
#include "kernels/cuda/kernels.h"
#endif

namespace tlcr {

// Number of elements that justify one more thread.
constexpr int64_t kGrain = 32768;

// Divides rows of `width` elements among the threads. A row is never split, so the number of threads changes no result.
template <typename OfRows>
void on_threads(const OfRows& of_rows, int64_t rows, int64_t width) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)), of_rows);
}

template <typename Arguments>
void on_threads(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int64_t rows,
                int64_t width) {
  on_threads([&](int64_t begin, int64_t end) { kernel(arguments, begin, end); }, rows, width);
}

#ifdef TLCR_CUDA
// On the current stream of the device that holds `like`.
template <typename Arguments>
void on_stream(cudaError_t (*kernel)(const Arguments&, cudaStream_t), const Tensor& like, const Arguments& arguments) {
  const torch::stable::accelerator::DeviceGuard device(like.get_device_index());
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  STD_CUDA_CHECK(kernel(arguments, static_cast<cudaStream_t>(stream)));
}
#endif

inline void run_score([[maybe_unused]] const Tensor& like, const ScoreArguments& arguments) {
#ifdef TLCR_CUDA
  if (like.is_cuda()) return on_stream(cuda::score, like, arguments);
#endif
  on_threads(cpu::kernels().score, arguments, arguments.rows, arguments.vocabulary);
}

inline void run_score_backward([[maybe_unused]] const Tensor& like, const ScoreBackwardArguments& arguments) {
#ifdef TLCR_CUDA
  if (like.is_cuda()) return on_stream(cuda::score_backward, like, arguments);
#endif
  on_threads(cpu::kernels().score_backward, arguments, arguments.rows, arguments.vocabulary);
}

inline void run_hidden_reward([[maybe_unused]] const Tensor& like, const HiddenRewardArguments& arguments) {
#ifdef TLCR_CUDA
  if (like.is_cuda()) return on_stream(cuda::hidden_reward, like, arguments);
#endif
  on_threads(cpu::kernels().hidden_reward, arguments, arguments.batch, arguments.length * arguments.width);
}

}  // namespace tlcr
