// 16-byte (or single-element) loads and stores that convert to and from float.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace tokenmill::cuda {

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T x[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ void load_floats(float (&to)[kCount], const T* from) {
  const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = static_cast<float>(pack.x[i]);
}

template <typename T, int kCount>
__device__ __forceinline__ void store_floats(T* to, const float (&from)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.x[i] = static_cast<T>(from[i]);
  // otherwise the compiler splits the store, even into elements
  if constexpr (sizeof(T) == 2 && kCount == 8) {
    uint4 words;
    memcpy(&words, &pack, sizeof pack);
    *reinterpret_cast<uint4*>(to) = words;
  } else {
    *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
  }
}

// Calls visit.operator()<T>() with the element type of `dtype`.
template <typename Visit>
auto visit_dtype(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::float16:
      return visit.template operator()<__half>();
    case DType::bfloat16:
      return visit.template operator()<__nv_bfloat16>();
    default:
      return visit.template operator()<float>();
  }
}

// True if rows of `dim` elements at p, a multiple of each stride apart, allow 16-byte accesses.
template <typename T, typename... Strides>
bool is_vectorizable(const void* p, int64_t dim, Strides... strides) {
  constexpr int64_t count = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && dim % count == 0 &&
         (... && (strides % count == 0));
}

}  // namespace tokenmill::cuda
