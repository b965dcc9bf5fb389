// The end of a row of softmax, for the CUDA kernels.
#pragma once
#include "cuda/math.cuh"

namespace tokenmill::cuda {

struct RowScale {
  float factor, lse;
};

// Normalises a softmax row whose weights sum to `sum` relative to 2^pivot. The sink is a logit
// without a value; shift, the constant of all logits, was left out of the exponents.
__device__ inline RowScale finish_softmax(float sum, float pivot, const float* sink, float shift) {
  if (shift == -infinity()) sum = 0;
  if (!(fabsf(shift) < infinity())) {
    if (sum > 0) sum = quiet_nan();
    shift = 0;
  }
  if (sum == 0) pivot = -infinity();
  if (!sink) {
    if (sum == 0) return {0, -infinity()};
    return {1 / sum, fmaf(pivot, kLn2, log2_approx(sum) * kLn2) + shift};
  }
  const float a = (*sink - shift) * kLog2e;
  const float top = a > pivot || !(pivot > -infinity()) ? a : pivot;
  if (top == -infinity()) return {0, -infinity()};
  if (top == infinity()) return {0, infinity()};
  const float weight = pivot == -infinity() ? 0 : exp2_approx(pivot - top);
  const float total = sum * weight + exp2_approx(a - top);
  return {weight / total, fmaf(top, kLn2, log2_approx(total) * kLn2) + shift};
}

}  // namespace tokenmill::cuda
