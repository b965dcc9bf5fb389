// Normalisation of a row at its end (CPU).
#pragma once
#include <cmath>
#include <limits>

#include "attention/params.h"
#include "cpu/simd.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct RowScale {
  float factor, lse;
};

// Normalises a softmax row whose weights sum to `sum` relative to 2^row_max. The sink is a logit
// without a value; shift was left out of the exponents. lse is 0 unless it is needed.
inline RowScale softmax_epilogue(float sum, float row_max, bool seen, const float* sink,
                                 float shift, bool needs_lse) {
  if (!seen) row_max = -kInf;
  if (!sink) {
    if (sum == 0) return {0, -kInf};
    return {1 / sum, needs_lse ? (row_max + std::log2(sum)) * kLn2 + shift : 0};
  }
  const float a = (*sink - shift) * kLog2e;
  const bool sink_leads = a > row_max || !(row_max > -kInf);
  const float top = sink_leads ? a : row_max;
  if (top == -kInf) return {0, -kInf};
  if (top == kInf) return {0, kInf};
  const float weight = row_max == -kInf ? 0 : std::exp2(row_max - top);
  const float total = sum * weight + std::exp2(a - top);
  if (!needs_lse) return {weight / total, 0};
  // lse is exactly the sink where the keys have no weight.
  const float lse =
      sink_leads ? *sink + std::log2(total) * kLn2 : (top + std::log2(total)) * kLn2 + shift;
  return {weight / total, lse};
}

// Normalisation factor of a row of any other kind, from its statistic: the sum of its weights, or
// the number of its visible keys.
inline float normalizer(const AttentionParams& p, float statistic) {
  if (p.normalize == Normalize::none) return 1;
  if (p.normalize == Normalize::count) return statistic > 0 ? 1 / statistic : 0;
  if (p.map != ScoreMap::linear) return 1 / (statistic + kSumEpsilon);
  const float size = std::fabs(statistic);
  return size > 1 ? 1 / size : 1;
}

}  // namespace tokenmill::TOKENMILL_ISA
