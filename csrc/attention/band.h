// Causal masks and windows as bands along the diagonal of the score matrix: row i sees the columns
// [i + low, i + high) that exist. Both ends grow with i.
#pragma once
#include "core/dtype.h"

namespace tokenmill {

struct Band {
  static constexpr int64_t kUnbounded = int64_t{1} << 40;  // beyond any sequence

  int64_t low, high, columns;

  // Rows are queries, columns keys; left and right count keys from the query's own position, -1 for
  // no limit.
  TOKENMILL_HOST_DEVICE static Band of_window(int64_t left, int64_t right, int64_t seqlen_q,
                                              int64_t seqlen_k) {
    const int64_t diagonal = seqlen_k - seqlen_q;  // bottom-right aligned
    return {left < 0 || left > kUnbounded ? -kUnbounded : diagonal - left,
            right < 0 || right > kUnbounded ? kUnbounded : diagonal + right + 1, seqlen_k};
  }
  // The same band with keys as rows and queries as columns.
  TOKENMILL_HOST_DEVICE Band transposed(int64_t rows) const { return {1 - high, 1 - low, rows}; }

  TOKENMILL_HOST_DEVICE int64_t begin(int64_t i) const { return i + low > 0 ? i + low : 0; }
  TOKENMILL_HOST_DEVICE int64_t end(int64_t i) const {
    return i + high < columns ? i + high : columns;
  }
};

}  // namespace tokenmill
