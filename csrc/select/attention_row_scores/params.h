#pragma once
#include "core/dtype.h"
#include "core/rows.h"
#include "cpu/isa.h"

namespace tokenmill {

enum class RowReduce : int32_t { none, sum, mean, max };

struct RowScoresParams {
  int64_t batch, heads, kv_heads;
  int64_t rows, seqlen_k, head_dim;
  DType dtype;
  Rows q, k;
  const float* lse;  // [B, H, R] with strides; null: to be computed
  int64_t lse_batch, lse_head;
  float scale;
  bool causal;
  RowReduce reduce;
  int64_t skip;            // keys that are not in the result
  const int32_t* lengths;  // [B], null: seqlen_k
  float* out;              // [B, Sk - skip], with none [B, H, R, Sk - skip]
  float* exponents;        // workspace [B, H, R, Sk]
  float* statistics;       // workspace of the CUDA kernels, [B, H, R] pairs

  TOKENMILL_HOST_DEVICE int64_t length(int64_t b) const {
    const int64_t n = lengths ? lengths[b] : seqlen_k;
    return n < 0 ? 0 : n > seqlen_k ? seqlen_k : n;
  }
  // Keys that row r of a request of `length` keys sees: those before.
  TOKENMILL_HOST_DEVICE int64_t end(int64_t r, int64_t length) const {
    const int64_t end = r + length - rows + 1;
    return causal && end < length ? (end > 0 ? end : 0) : length;
  }
};

// null, or what went wrong
const char* launch_cuda(const RowScoresParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(attention_row_scores, RowScoresParams)
