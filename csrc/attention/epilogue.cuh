// Normalisation of a row at its end.
#pragma once
#include "attention/params.h"
#include "cuda/math.cuh"

namespace tokenmill::cuda {

struct RowScale {
  float factor, lse;
};

// Normalises a softmax row whose weights sum to `sum` relative to 2^row_max. The sink is a logit
// without a value; shift, the constant of all logits, was left out of the exponents.
__device__ inline RowScale softmax_epilogue(float sum, float row_max, const float* sink,
                                            float shift) {
  if (shift == -infinity()) sum = 0;
  if (!(fabsf(shift) < infinity())) {
    if (sum > 0) sum = quiet_nan();
    shift = 0;
  }
  if (sum == 0) row_max = -infinity();
  if (!sink) {
    if (sum == 0) return {0, -infinity()};
    return {1 / sum, fmaf(row_max, kLn2, log2_approx(sum) * kLn2) + shift};
  }
  const float a = (*sink - shift) * kLog2e;
  const bool sink_leads = a > row_max || !(row_max > -infinity());
  const float top = sink_leads ? a : row_max;
  if (top == -infinity()) return {0, -infinity()};
  if (top == infinity()) return {0, infinity()};
  const float weight = row_max == -infinity() ? 0 : exp2_approx(row_max - top);
  const float total = sum * weight + exp2_approx(a - top);
  // lse is exactly the sink where the keys have no weight.
  const float log_total = log2_approx(total) * kLn2;
  const float lse = sink_leads ? *sink + log_total : fmaf(top, kLn2, log_total) + shift;
  return {weight / total, lse};
}

// Factor that normalises the weights of a row. statistic: their sum, or their number.
__device__ __forceinline__ float inverse_of_row(ScoreMap map, Normalize normalize,
                                                float statistic) {
  if (normalize == Normalize::none) return 1;
  if (normalize == Normalize::count) return statistic > 0 ? 1 / statistic : 0;
  if (map == ScoreMap::linear) return 1 / max_or_nan(fabsf(statistic), 1);
  return 1 / (statistic + kSumEpsilon);
}

}  // namespace tokenmill::cuda
