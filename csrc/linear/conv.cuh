// Device code of the causal convolutions: a thread holds adjacent channels.
#pragma once
#include "cuda/vector.cuh"
#include "linear/conv_params.h"
#include "linear/feature_map.cuh"

namespace tokenmill::cuda::conv {

constexpr int kThreads = 128;

// Adjacent channels per thread: 16 bytes, fewer where 8 taps fill the registers.
template <typename T, int kTaps>
constexpr int kChannels = kTaps == 8 ? 4 : 16 / static_cast<int>(sizeof(T));

__device__ inline float load_as_float(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::float16) return __half2float(static_cast<const __half*>(data)[i]);
  if (dtype == DType::bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

__device__ inline void store_from_float(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::float16)
    static_cast<__half*>(data)[i] = __float2half(x);
  else if (dtype == DType::bfloat16)
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(x);
  else
    static_cast<float*>(data)[i] = x;
}

// Four adjacent elements, aligned as one.
__device__ inline void load_four(float (&to)[4], const void* data, DType dtype, int64_t i) {
  if (dtype == DType::float16)
    load_floats(to, static_cast<const __half*>(data) + i);
  else if (dtype == DType::bfloat16)
    load_floats(to, static_cast<const __nv_bfloat16*>(data) + i);
  else
    load_floats(to, static_cast<const float*>(data) + i);
}

__device__ inline float load_tap(const ConvFilter& f, int64_t channel, int64_t j) {
  return load_as_float(f.weight, f.dtype, channel * f.channel + j * f.tap);
}
__device__ inline float load_bias(const ConvFilter& f, int64_t channel) {
  return f.bias ? load_as_float(f.bias, f.bias_dtype, channel * f.bias_channel) : 0;
}

// The filter of a thread. Taps lie at the end of kTaps places, the newest last.
template <int kVector, int kTaps>
struct Taps {
  float tap[kTaps][kVector], bias[kVector];
  int unused;  // places before the first tap

  __device__ Taps(const ConvFilter& f, int64_t channel)
      : unused(kTaps - static_cast<int>(f.width)) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) bias[e] = load_bias(f, channel + e);
    if (kTaps == 4 && f.quads) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        float row[4];
        load_four(row, f.weight, f.dtype, (channel + e) * 4);
#pragma unroll
        for (int s = 0; s < 4; ++s) tap[s][e] = row[s];
      }
      return;
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
#pragma unroll
      for (int s = 0; s < kTaps; ++s)
        tap[s][e] = s >= unused ? load_tap(f, channel + e, s - unused) : 0;
    }
  }

  // bias + sum over taps of tap x: the window of the inputs before, and the token's own.
  __device__ void convolve(float (&sum)[kVector], const float (&window)[kTaps - 1][kVector],
                           const float (&own)[kVector]) const {
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum[e] = bias[e];
#pragma unroll
    for (int s = 0; s < kTaps - 1; ++s)
      if (s >= unused) {  // no product with inputs that no tap meets: they may be NaN
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[e] = fmaf(tap[s][e], window[s][e], sum[e]);
      }
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum[e] = fmaf(tap[kTaps - 1][e], own[e], sum[e]);
  }
};

template <int kVector, int kTaps>
__device__ __forceinline__ void shift(float (&window)[kTaps - 1][kVector],
                                      const float (&own)[kVector]) {
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
#pragma unroll
    for (int s = 0; s + 2 < kTaps; ++s) window[s][e] = window[s + 1][e];
    window[kTaps - 2][e] = own[e];
  }
}

}  // namespace tokenmill::cuda::conv
