// The CUDA kernels. Each launches on `stream` and returns the status of the launch; none waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include "../arguments.h"

namespace tlcr::cuda {

cudaError_t score(const ScoreArguments&, cudaStream_t stream);
cudaError_t score_backward(const ScoreBackwardArguments&, cudaStream_t stream);
cudaError_t hidden_reward(const HiddenRewardArguments&, cudaStream_t stream);

}  // namespace tlcr::cuda
