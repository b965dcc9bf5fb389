#pragma once
#include "core/dtype.h"
#include "core/rows.h"
#include "cpu/isa.h"

namespace tokenmill {

enum class ColumnReduce : int32_t { sum, mean, visible_mean };
enum class HeadReduce : int32_t { none, group_mean, group_max };

struct ColumnScoresParams {
  int64_t batch, heads, kv_heads;
  int64_t seqlen_q, seqlen_k, head_dim;
  DType dtype;
  Rows q, k;
  const float* lse;  // [B, H, Sq], strided; null: to be computed
  int64_t lse_batch, lse_head;
  float scale;
  bool causal;
  ColumnReduce reduce;
  HeadReduce head_reduce;
  int64_t window_queries;                  // number of last queries that count; seqlen_q: all
  const int32_t *lengths, *query_lengths;  // [B], null: seqlen_k, seqlen_q
  float inverse_tau;                       // 0: no noise
  uint64_t seed;
  float* out;       // [B, H or Hk, Sk]
  void* workspace;  // CUDA only
};

// Extent of one request: the queries and keys that count.
struct ColumnScoresRequest {
  int64_t first_row, rows, columns, diagonal;  // queries first_row .. rows - 1
  bool causal;

  TOKENMILL_HOST_DEVICE ColumnScoresRequest(const ColumnScoresParams& p, int64_t b)
      : rows(clamped(p.query_lengths, b, p.seqlen_q)),
        columns(clamped(p.lengths, b, p.seqlen_k)),
        causal(p.causal) {
    first_row = rows > p.window_queries ? rows - p.window_queries : 0;
    diagonal = columns - rows;
  }

  // Query i sees the keys before column_end(i).
  TOKENMILL_HOST_DEVICE int64_t column_end(int64_t i) const {
    const int64_t end = i + diagonal + 1;
    return causal && end < columns ? (end > 0 ? end : 0) : columns;
  }
  // Key j is seen by queries row_begin(j) .. rows - 1.
  TOKENMILL_HOST_DEVICE int64_t row_begin(int64_t j) const {
    const int64_t begin = j - diagonal;
    return causal && begin > first_row ? begin : first_row;
  }
  // Divisor of a column's sum for the mean.
  TOKENMILL_HOST_DEVICE int64_t divisor(ColumnReduce reduce, int64_t j) const {
    const int64_t count = reduce == ColumnReduce::mean ? rows - first_row : rows - row_begin(j);
    return reduce == ColumnReduce::sum || count < 1 ? 1 : count;
  }

 private:
  TOKENMILL_HOST_DEVICE static int64_t clamped(const int32_t* lengths, int64_t b, int64_t longest) {
    const int64_t length = lengths ? lengths[b] : longest;
    return length < 0 ? 0 : length > longest ? longest : length;
  }
};

// CUDA workspace in bytes.
int64_t workspace_bytes(const ColumnScoresParams&);

// null, or an error message
const char* launch_cuda(const ColumnScoresParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(attention_column_scores, ColumnScoresParams)
