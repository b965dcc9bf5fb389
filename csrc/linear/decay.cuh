// Powers that decays are made of.
#pragma once
#include "cuda/math.cuh"

namespace tokenmill::cuda {

// Below these nothing of the state is left, and infinities would meet in differences.
constexpr float kLeastHeadDecay = -1e4f;
constexpr float kLeastTokenDecay = -128;

// 2^x, where x has more digits than a float.
__device__ __forceinline__ float exp2_exact(double x) {
  const float high = static_cast<float>(x);
  const float y = exp2_approx(high);
  return fmaf(y * kLn2, static_cast<float>(x - high), y);
}

// In base 2. NaN stays.
__device__ __forceinline__ double log2_decay(float x, float least) {
  return 1.4426950408889634 * (x < least ? least : x);
}

}  // namespace tokenmill::cuda
