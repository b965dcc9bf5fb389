// Element-wise feature maps; taylor2 is built from products of elements.
#pragma once
#include "cuda/math.cuh"
#include "linear/params.h"

namespace tokenmill::cuda {

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal_approx(1 + exp2_approx(-kLog2e * x));
}

__device__ __forceinline__ float map_feature(FeatureMap map, float x) {
  switch (map) {
    case FeatureMap::elu1:
      return x < 0 ? exp2_approx(kLog2e * x) : x + 1;
    case FeatureMap::relu:
      return x < 0 ? 0 : x;  // NaN propagates
    case FeatureMap::silu:
      return x * sigmoid(x);
    default:
      return x;
  }
}

}  // namespace tokenmill::cuda
