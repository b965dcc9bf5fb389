// Powers of decays.
#pragma once
#include "cuda/math.cuh"

namespace tokenmill::cuda {

// Below these nothing of the state is left; clamping avoids Inf - Inf.
constexpr float kMinHeadDecay = -1e4f;
constexpr float kMinTokenDecay = -128;

// 2^x for x with more precision than a float.
__device__ __forceinline__ float exp2_exact(double x) {
  const float high = static_cast<float>(x);
  const float y = exp2_approx(high);
  return fmaf(y * kLn2, static_cast<float>(x - high), y);
}

// Log2 of a decay given in natural log. NaN propagates.
__device__ __forceinline__ double log2_decay(float x, float minimum) {
  return 1.4426950408889634 * (x < minimum ? minimum : x);
}

}  // namespace tokenmill::cuda
