// Types, addresses and 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../arguments.h"
#include "platform.cuh"

namespace tlcr::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The type of the arithmetic on values of type T.
template <typename T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <typename T>
using Real = typename RealOf<T>::type;

__device__ __forceinline__ float to_real(float x) { return x; }
__device__ __forceinline__ double to_real(double x) { return x; }
__device__ __forceinline__ float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_real(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_real(Real<T> x);
template <>
__device__ __forceinline__ float from_real<float>(float x) { return x; }
template <>
__device__ __forceinline__ double from_real<double>(double x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_real<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_real<__half>(float x) { return __float2half_rn(x); }

// 2^x.
__device__ __forceinline__ float exp2_of(float x) { return exp2_approximate(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

// Calls `function` with a value of the C++ type that `type` names.
template <typename Function>
cudaError_t with_type(Type type, Function&& function) {
  switch (type) {
    case Type::kFloat: return function(float{});
    case Type::kDouble: return function(double{});
    case Type::kBFloat16: return function(__nv_bfloat16{});
    case Type::kHalf: return function(__half{});
  }
  return cudaErrorInvalidValue;
}

template <typename T>
__device__ __forceinline__ T* row_begin(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row / rows.inner * rows.outer_stride + row % rows.inner * rows.inner_stride;
}

template <typename T>
__device__ __forceinline__ T element_or(const void* data, int64_t index, T otherwise) {
  return data == nullptr ? otherwise : static_cast<const T*>(data)[index];
}

// As many elements as one access moves.
template <typename T>
constexpr int kPack = sizeof(uint4) / sizeof(T);

template <typename T>
struct alignas(16) Pack {
  T element[kPack<T>];
};

// Each logit is read once: it should not push out of the cache what is read again. `aligned`: to 16 bytes.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, bool aligned) {
  Pack<T> pack;
  if (aligned) {
    *reinterpret_cast<uint4*>(&pack) = __ldcs(reinterpret_cast<const uint4*>(from));
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.element[i] = from[i];
  }
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T>& pack, bool aligned) {
  if (aligned) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&pack);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) to[i] = pack.element[i];
  }
}

// A row cut into whole packs that begin at multiples of 16 bytes, and the fewer than 2 kPack elements before and after
// them, its edges. Where a row begins differs from row to row if the row's length is no multiple of kPack.
template <typename T>
struct Cut {
  int head, packs, edges;

  __device__ __forceinline__ Cut(const T* row, int length) {
    const int before = static_cast<int>(-reinterpret_cast<uintptr_t>(row) % sizeof(uint4) / sizeof(T));
    head = before < length ? before : length;
    packs = (length - head) / kPack<T>;
    edges = length - packs * kPack<T>;
  }

  // The column of the i-th edge element.
  __device__ __forceinline__ int edge(int i) const { return i < head ? i : i + packs * kPack<T>; }
};

// Whether packs that are aligned in one row are aligned in the other.
__device__ __forceinline__ bool same_phase(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % sizeof(uint4) == 0;
}

}  // namespace tlcr::cuda
