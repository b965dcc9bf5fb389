// Maps from logits to weights.
#pragma once
#include <type_traits>

#include "attention/params.h"
#include "cuda/math.cuh"

namespace tokenmill::cuda {

// elementwise: any map but softmax, with any normalisation, chosen at run time. `any`, as a
// template argument, leaves all of it to run time.
enum class Weights : int { softmax, sigmoid, fast_sigmoid, elementwise, any };

__host__ __device__ inline Weights weights_of(const AttentionParams& p) {
  if (p.map == ScoreMap::softmax) return Weights::softmax;
  if (p.map != ScoreMap::sigmoid || p.normalize != Normalize::none) return Weights::elementwise;
  return p.fast ? Weights::fast_sigmoid : Weights::sigmoid;
}

// Sigmoid weights are scaled by 2^15 in float16, which cannot hold weights near 1 / n from n =
// 16384 on. (fast_sigmoid has an absolute error of 2^-12 anyway.)
template <typename T>
constexpr int kLog2Scale = std::is_same_v<T, __half> ? 15 : 0;
template <typename T>
constexpr float kScale = 1 << kLog2Scale<T>;

// Scale of the weights: 1 for the other maps, whose weights have no bound.
template <typename T>
__device__ __forceinline__ float scale_of(ScoreMap map) {
  return map == ScoreMap::sigmoid ? kScale<T> : 1;
}

// True if the float16 backward scales P by kHalfScale: the maps whose weights are at most 1.
__host__ __device__ inline bool scales_weights(const AttentionParams& p) {
  return p.map == ScoreMap::sigmoid || (p.normalize == Normalize::sum && p.map != ScoreMap::linear);
}

// Calls each(apply_map) with the map's apply_map(z), z in nats. kHides: z may be -inf, which hides
// its pair and has weight 0.
template <typename T, bool kHides, typename Each>
__device__ __forceinline__ void visit_map(ScoreMap map, const Each& each) {
  const auto shown = [](float z, float weight) {
    return kHides && z == -infinity() ? 0.f : weight;
  };
  if (map == ScoreMap::relu || map == ScoreMap::linear) {
    const float minimum = map == ScoreMap::relu ? 0 : -infinity();
    each([&](float z) { return shown(z, max_or_nan(z, minimum)); });
  } else if (map == ScoreMap::elu1) {
    // e^0 where z is positive; a NaN is not.
    each([](float z) { return z > 0 ? z + 1 : exp2_approx(z * kLog2e); });
  } else if (map == ScoreMap::taylor2) {
    each([&](float z) { return shown(z, fmaf(z, fmaf(z, 0.5f, 1.f), 1.f)); });
  } else {
    each([](float z) {
      return reciprocal_approx(exp2_approx(fmaf(z, -kLog2e, -kLog2Scale<T>)) + 1 / kScale<T>);
    });
  }
}

// f(z) and f'(z).
struct Slope {
  float value, slope;
};

// Calls each(slope_of) with the map's slope_of(z), for maps without bounds and finite logits.
template <typename Each>
__device__ __forceinline__ void visit_slope(ScoreMap map, const Each& each) {
  if (map == ScoreMap::relu)
    each([](float z) -> Slope { return {max_or_nan(z, 0), z < 0 ? 0.f : 1.f}; });
  else if (map == ScoreMap::elu1)
    each([](float z) -> Slope {
      const float e = exp2_approx(z * kLog2e);
      return {z > 0 ? z + 1 : e, z > 0 ? 1.f : e};
    });
  else if (map == ScoreMap::taylor2)
    each([](float z) -> Slope { return {fmaf(z, fmaf(z, 0.5f, 1.f), 1.f), z + 1}; });
  else
    each([](float z) -> Slope { return {z, 1.f}; });
}

}  // namespace tokenmill::cuda
