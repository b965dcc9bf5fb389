// What makes a weight of a logit.
#pragma once
#include <type_traits>

#include "cuda/math.cuh"
#include "dense/attention/params.h"

namespace tokenmill::cuda {

// As a template argument, `any` leaves the choice to run time.
enum class Weights : int { softmax, sigmoid, fast_sigmoid, any };

__host__ __device__ inline Weights weights_of(const AttentionParams& p) {
  if (p.map == ScoreMap::softmax) return Weights::softmax;
  return p.fast ? Weights::fast_sigmoid : Weights::sigmoid;
}

// Sigmoid weights are scaled: float16 cannot hold those near 1 / n from n = 16384 on. (The fast
// ones have an absolute error of 2^-12 anyway.)
template <typename T>
constexpr int kLog2Scale = std::is_same_v<T, __half> ? 15 : 0;
template <typename T>
constexpr float kScale = 1 << kLog2Scale<T>;

}  // namespace tokenmill::cuda
