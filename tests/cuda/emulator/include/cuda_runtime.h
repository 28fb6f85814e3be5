// A stand-in for CUDA's header, found first on the include path by the tests' g++: with it the kernels' own sources are
// plain C++, and a grid runs on the CPU. What is here is what they use; a name that is missing does not compile.
//
// Threads are fibers. One runs at a time, until it waits for others, so that a result depends on their order only if
// the kernel has a race; the tests run every kernel in several orders. It is an error, which the launch returns, if a
// barrier or an exchange within a warp is not reached by all that it waits for, or if a vector is not aligned.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#include "cuda_runtime_api.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // between red zones
#else
#define __shared__ static __attribute__((section("emulated_shared")))  // poisoned before every block
#endif

struct dim3 {
  unsigned x, y, z;
};

namespace emulator {
[[noreturn]] void fail(const char* what);
}

// A store must be aligned as on the device; the types themselves are not, so that g++ takes nothing for granted.
template <typename Vector>
struct AlignedStore {
  AlignedStore() = default;
  AlignedStore(const AlignedStore&) = default;
  AlignedStore& operator=(const AlignedStore&) {
    if (reinterpret_cast<uintptr_t>(this) % sizeof(Vector) != 0) emulator::fail("a store is not aligned");
    return *this;
  }
};
struct uint2 : AlignedStore<uint2> {
  uint32_t x, y;
};
struct uint4 : AlignedStore<uint4> {
  uint32_t x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

cudaError_t run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);
void wait_for_block(const char* where);
// Hands `value` to the warp and waits for all its lanes; then `received` gives what a lane handed in.
void exchange(const char* what, unsigned lanes, const void* value, size_t size);
const void* received(unsigned lane);

template <typename T>
T shuffle_xor(unsigned lanes, T value, int lane_bits) {
  exchange("shuffle", lanes, &value, sizeof(T));
  T result;
  memcpy(&result, received(threadIdx.x % 32 ^ static_cast<unsigned>(lane_bits)), sizeof(T));
  return result;
}

inline bool any(unsigned lanes, bool value) {
  exchange("vote", lanes, &value, sizeof(value));
  bool result = false;
  for (unsigned lane = 0; lane < 32; ++lane) result |= *static_cast<const bool*>(received(lane));
  return result;
}

template <typename T>
T aligned_load(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) fail("a load is not aligned");
  return *from;
}

}  // namespace emulator

#define EMULATOR_TEXT(x) #x
#define EMULATOR_LINE(x) EMULATOR_TEXT(x)
#define __syncthreads() emulator::wait_for_block(__FILE__ ":" EMULATOR_LINE(__LINE__))

template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int lane_bits) {
  return emulator::shuffle_xor(lanes, value, lane_bits);
}
inline bool __any_sync(unsigned lanes, bool value) { return emulator::any(lanes, value); }
template <typename T>
T __ldcs(const T* from) {
  return emulator::aligned_load(from);
}
template <typename T>
T __ldg(const T* from) {
  return emulator::aligned_load(from);
}

// The lower half of `high` and `low`, side by side, shifted right.
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

namespace tlcr::cuda {

inline float exp2_approximate(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}

inline void require(bool condition) {
  if (!condition) emulator::fail("a device assertion failed");
}

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, int threads, cudaStream_t, const Arguments& arguments) {
  return emulator::run(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { kernel(arguments); });
}

}  // namespace tlcr::cuda
