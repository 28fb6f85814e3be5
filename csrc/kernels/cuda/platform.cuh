// Everything that only nvcc can compile: the kernels themselves contain no PTX and no <<<>>>. For another compiler the
// tests put a replacement for <cuda_runtime.h> on the include path. It defines the names below and runs a grid on the
// CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__

namespace tlcr::cuda {

// 2^x to about 2 units in the last place, in one instruction; 0 where the result would be subnormal.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Ends the grid with an error that every later call on the device reports. assert() would not do: NDEBUG removes it.
__device__ __forceinline__ void require(bool condition) {
  if (!condition) __trap();
}

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments& arguments) {
  if (blocks == 0) return cudaSuccess;  // an empty grid is a launch error
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace tlcr::cuda

#endif
