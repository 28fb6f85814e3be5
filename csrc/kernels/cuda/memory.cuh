// Types, addresses and 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

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
__device__ __forceinline__ float from_real<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double from_real<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_real<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_real<__half>(float x) {
  return __float2half_rn(x);
}

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

// The number of elements that one access moves.
template <typename T>
constexpr int kPack = sizeof(uint4) / sizeof(T);

template <typename T, int kCount = kPack<T>>
struct alignas(kCount * sizeof(T)) Pack {
  T element[kCount];
};

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Each logit is read once, so it should not displace cached data that is read again. `aligned`: to 16 bytes.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, bool aligned) {
  if (aligned) return bits_as<Pack<T>>(__ldcs(reinterpret_cast<const uint4*>(from)));
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) pack.element[i] = from[i];
  return pack;
}

// Whether a pack of kCount elements there may be accessed at once.
template <int kCount, typename T>
__device__ __forceinline__ bool is_aligned(const T* pack) {
  return reinterpret_cast<uintptr_t>(pack) % (kCount * sizeof(T)) == 0;
}

// The 16 bytes that begin `past` bytes after the first of 32.
template <typename T>
__device__ __forceinline__ Pack<T> bytes_between(const uint4& first, const uint4& second, unsigned past) {
  unsigned words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) words[i] = past & 8 ? words[i + 2] : words[i];
  if constexpr (sizeof(T) <= 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = past & 4 ? words[i + 1] : words[i];
  }
  if constexpr (sizeof(T) <= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], past % 4 * 8);
  }
  const unsigned chosen[4] = {words[0], words[1], words[2], words[3]};
  return bits_as<Pack<T>>(chosen);
}

// The pack with elements [pack * kPack, (pack + 1) * kPack) of a row that has `packs` whole ones. Which elements make a
// pack does not depend on the row's address, and so no sum does: where packs are not aligned, each is cut out of the 32
// aligned bytes around it. Those of the first and the last pack may belong to other rows.
template <typename T, bool kAligned>
__device__ __forceinline__ Pack<T> load_pack_of(const T* row, int pack, int packs) {
  const T* from = row + pack * kPack<T>;
  if (kAligned || pack == 0 || pack + 1 == packs) return load_pack(from, kAligned);
  const unsigned past = static_cast<unsigned>(reinterpret_cast<uintptr_t>(from) % sizeof(uint4));
  const auto* around = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(from) - past);
  return bytes_between<T>(__ldcs(around), __ldcs(around + 1), past);
}

template <typename T, int kCount>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kCount>& pack, bool aligned) {
  if (aligned) {
    using Word = std::conditional_t<sizeof(pack) == sizeof(uint4), uint4, uint2>;
    *reinterpret_cast<Word*>(to) = bits_as<Word>(pack);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = pack.element[i];
}

template <typename T>
__device__ __forceinline__ void unpack(const Pack<T>& pack, Real<T> (&x)[kPack<T>]) {
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) x[i] = to_real(pack.element[i]);
}

// A bfloat16 is the upper half of a float: its conversion takes one instruction, a conversion of the halves takes two.
template <>
__device__ __forceinline__ void unpack(const Pack<__nv_bfloat16>& pack, float (&x)[8]) {
  const uint4 bits = bits_as<uint4>(pack);
  const unsigned pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    x[i] = __uint_as_float(pairs[i / 2] << 16);
    x[i + 1] = __uint_as_float(pairs[i / 2] & 0xffff0000u);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> pack_of(const Real<T> (&x)[kCount]) {
  // Two numbers are rounded by one instruction.
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    __nv_bfloat162 pairs[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    return bits_as<Pack<T, kCount>>(pairs);
  } else if constexpr (std::is_same_v<T, __half>) {
    __half2 pairs[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) pairs[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
    return bits_as<Pack<T, kCount>>(pairs);
  } else {
    return bits_as<Pack<T, kCount>>(x);
  }
}

// A row divided into whole packs, which begin at multiples of 16 bytes, and its edges, which are the fewer than 2 kPack
// elements before and after the packs. Rows differ in this if their length is no multiple of kPack: it is for what each
// element needs no other one for.
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

}  // namespace tlcr::cuda
