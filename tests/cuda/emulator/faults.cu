// Kernels with the faults that the emulator is there to find, each a line away from the one without.
#include "platform.cuh"

namespace {

enum Fault : int { kNone, kNoBarrier, kSomeMissTheBarrier, kTwoBarriers, kSomeLanesMissTheShuffle, kMisaligned };

struct Arguments {
  const float* from;
  float* to;
  int fault;
};

// Reverses the block's values, then adds the neighbouring lane's to each.
__global__ void reverse_kernel(const Arguments a) {
  __shared__ float values[64];
  const unsigned i = threadIdx.x;
  values[i] = a.from[i];
  if (a.fault == kTwoBarriers && i % 2 == 0) {
    __syncthreads();
  } else if (a.fault != kNoBarrier && (a.fault != kSomeMissTheBarrier || i < 32)) {
    __syncthreads();
  }
  const float mine = values[63 - i];
  if (a.fault == kSomeLanesMissTheShuffle && i % 32 > 20) return;
  const float neighbour = __shfl_xor_sync(0xffffffffu, mine, 1);
  if (a.fault == kMisaligned) __ldcs(reinterpret_cast<const uint4*>(a.from + 1));
  a.to[i] = mine + neighbour;
}

}  // namespace

extern "C" int run_with_fault(int fault, const float* from, float* to) {
  return tlcr::cuda::launch(reverse_kernel, 1, 64, nullptr, Arguments{from, to, fault});
}
