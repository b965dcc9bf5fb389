// The end of a row of softmax, for the CPU kernels.
#pragma once
#include <cmath>
#include <limits>

#include "cpu/simd.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct RowScale {
  float factor, lse;
};

// Normalises a softmax row whose weights sum to `sum` relative to 2^row_max. The sink is a logit
// without a value; shift was left out of the exponents.
inline RowScale softmax_epilogue(float sum, float row_max, bool seen, const float* sink,
                                 float shift) {
  if (!seen) row_max = -kInf;
  if (!sink) {
    if (sum == 0) return {0, -kInf};
    return {1 / sum, (row_max + std::log2(sum)) * kLn2 + shift};
  }
  const float a = (*sink - shift) * kLog2e;
  const float top = a > row_max || !(row_max > -kInf) ? a : row_max;
  if (top == -kInf) return {0, -kInf};
  if (top == kInf) return {0, kInf};
  const float weight = row_max == -kInf ? 0 : std::exp2(row_max - top);
  const float total = sum * weight + std::exp2(a - top);
  return {weight / total, (top + std::log2(total)) * kLn2 + shift};
}

}  // namespace tokenmill::TOKENMILL_ISA
