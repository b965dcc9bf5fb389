// Columns of a bias and of dbias, for the backward CPU kernel: lanes are queries.
#pragma once
#include "attention/cpu_scores.h"

namespace tokenmill::TOKENMILL_ISA {

// Sums over the pairs of one head, in double: there may be 2^32 pairs.
struct HeadSums {
  double score_bias = 0, alibi_slopes = 0, sink = 0;

  void add(const HeadSums& other) {
    score_bias += other.score_bias;
    alibi_slopes += other.alibi_slopes;
    sink += other.sink;
  }
};

// Bias of queries query .. query + kWidth - 1 and one key.
inline vf bias_column(const ScoreMod& mod, int64_t query, int64_t key) {
  if (key >= mod.columns) return zero();
  const int64_t at = key * mod.bias_k;
  if (mod.bias_q == 0) return set(scalar_as_float(mod.bias, mod.bias_dtype, at));
  return visit_elements(mod.bias_dtype, [&](auto e) TM_LAMBDA {
    using T = typename decltype(e)::type;
    T lane[kWidth] = {};
    for (int64_t l = 0; l < kWidth && query + l < mod.rows; ++l)
      lane[l] = static_cast<const T*>(mod.bias)[at + (query + l) * mod.bias_q];
    return e.load(lane, 0);
  });
}

// Adds dz to the same column of dbias of head h of batch entry b. Queries may share one element.
inline void add_to_column(vf dz, const ScoreMod& mod, const AttentionBackwardParams& bp, int64_t b,
                          int64_t h, int64_t query, int64_t key) {
  if (key >= mod.columns) return;
  float* column = bp.dbias + b * bp.dbias_batch + h * bp.dbias_head + key * bp.dbias_k;
  if (bp.dbias_q == 0) {
    *column += sum_lanes(dz);
    return;
  }
  float lane[kWidth];
  store(lane, dz);
  for (int64_t l = 0; l < kWidth && query + l < mod.rows; ++l)
    column[(query + l) * bp.dbias_q] += lane[l];
}

}  // namespace tokenmill::TOKENMILL_ISA
