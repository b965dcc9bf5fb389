// Approximate special functions of the hardware, and packed pairs. Denormals are flushed to zero.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace tokenmill::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kFloatMax = 3.402823466e38f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float quiet_nan() { return __int_as_float(0x7fffffff); }

// Relative error 2^-22.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Relative error 2^-23.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Absolute error 2^-22 around 1, relative error 2^-22 elsewhere.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Relative error 2^-11.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Relative error below 3e-7: an odd polynomial near 0, where 1 - 2 / (1 + e^2x) cancels.
__device__ inline float tanh_accurate(float x) {
  const float u = x * x;
  float p = fmaf(u, -0.005852168625f, 0.02075362886f);
  p = fmaf(p, u, -0.0537687047f);
  p = fmaf(p, u, 0.1333168896f);
  p = fmaf(p, u, -0.3333328326f);
  p = fmaf(p, u, 0.9999999975f);
  return u < 0.36f ? p * x : 1.f - 2.f * reciprocal_approx(1.f + exp2_approx(x * (2 * kLog2e)));
}

// max (min) of two numbers, NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Two floats rounded to T; `low` becomes the low half, at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Two 16-bit elements of a word.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(reinterpret_cast<const __half2&>(word));
  else
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

// a b + c, and a b, of packed float16 pairs.
__device__ __forceinline__ uint32_t fma_packed(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
__device__ __forceinline__ uint32_t mul_packed(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// a / 2 + 1 / 2 of a packed float16 pair.
__device__ __forceinline__ uint32_t half_plus_half(uint32_t a) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %2;" : "=r"(y) : "r"(a), "r"(0x38003800));
  return y;
}

// max of packed pairs; NaN only where both are.
template <typename T>
__device__ __forceinline__ uint32_t max_packed(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t max_packed<__half>(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

template <>
__device__ __forceinline__ uint32_t max_packed<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

}  // namespace tokenmill::cuda
