// Reductions over the splits of the two passes.
#pragma once
#include "select/attention_column_scores/kernel.cuh"

namespace tokenmill::cuda::attention_column_scores {

// row_max and weight of each row, from lse or from the splits of the first pass.
__global__ void __launch_bounds__(kScoreThreads)
    row_statistics_kernel(const __grid_constant__ ColumnScoresParams p, const ScorePlan plan) {
  const int64_t rows = p.batch * p.heads * p.window_queries;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kScoreThreads + threadIdx.x;
  if (at >= rows) return;
  const int64_t bh = at / p.window_queries, b = bh / p.heads;
  const ColumnScoresRequest request(p, b);
  const int64_t row = request.first_row + at % p.window_queries;
  if (row >= request.rows) return;
  float top = -kFloatMax, sum = 0;
  if (p.lse) {
    const float lse = p.lse[b * p.lse_batch + bh % p.heads * p.lse_head + row];
    top = lse * kLog2e;
    sum = lse == -infinity() ? 0 : 1;
  } else {
    for (int split = 0; split < plan.splits; ++split) {
      const float2 part = plan.parts[split * rows + at];
      const float maximum = fmaxf(top, part.x);
      sum = sum * exp2_approx(top - maximum) + part.y * exp2_approx(part.x - maximum);
      top = maximum;
    }
  }
  // no exponent exceeds +inf: P = 0
  plan.statistics[at] = sum == 0 ? float2{infinity(), 0} : float2{top, 1 / sum};
}

// Scores of keys per head or group, from the splits of the second pass.
__global__ void __launch_bounds__(kScoreThreads)
    reduce_columns_kernel(const __grid_constant__ ColumnScoresParams p, const ScorePlan plan) {
  const bool together = p.head_reduce != HeadReduce::none;
  const int64_t outs = together ? p.kv_heads : p.heads, group = p.heads / outs;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kScoreThreads + threadIdx.x;
  if (at >= p.batch * outs * p.seqlen_k) return;
  const int64_t j = at % p.seqlen_k, b = at / p.seqlen_k / outs;
  const ColumnScoresRequest request(p, b);
  float score = 0;
  if (j < request.columns) {
    const auto divisor = static_cast<float>(request.divisor(p.reduce, j));
    for (int64_t g = 0; g < group; ++g) {
      float sum = 0;
      for (int split = 0; split < plan.splits; ++split)
        sum +=
            plan.sums[(split * p.batch * p.heads + at / p.seqlen_k * group + g) * p.seqlen_k + j];
      sum /= divisor;
      if (g == 0)
        score = sum;
      else if (p.head_reduce == HeadReduce::group_mean)
        score += sum;
      else
        score = sum > score || sum != sum ? sum : score;
    }
    if (p.head_reduce == HeadReduce::group_mean) score /= static_cast<float>(group);
  }
  p.out[at] = score;
}

}  // namespace tokenmill::cuda::attention_column_scores
