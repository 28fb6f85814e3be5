// The kernels' entry points for ctypes, and the sizes that its mirrors of the structs must have.
#include "kernels.h"

extern "C" {

int emulated_score(const tlcr::ScoreArguments* a) { return tlcr::cuda::score(*a, nullptr); }
int emulated_score_backward(const tlcr::ScoreBackwardArguments* a) { return tlcr::cuda::score_backward(*a, nullptr); }
int emulated_hidden_reward(const tlcr::HiddenRewardArguments* a) { return tlcr::cuda::hidden_reward(*a, nullptr); }

int size_of_score_arguments() { return sizeof(tlcr::ScoreArguments); }
int size_of_score_backward_arguments() { return sizeof(tlcr::ScoreBackwardArguments); }
int size_of_hidden_reward_arguments() { return sizeof(tlcr::HiddenRewardArguments); }

}  // extern "C"
