#pragma once
#include "core/dtype.h"
#include "core/rows.h"
#include "cpu/isa.h"

namespace tokenmill {

enum class RowReduce : int32_t { none, sum, mean, max, argmax };

struct RowScoresParams {
  int64_t batch, heads, kv_heads;
  int64_t rows, seqlen_k, head_dim;
  DType dtype;
  Rows q, k;
  const float* lse;  // [B, H, R], strided; null: to be computed
  int64_t lse_batch, lse_head;
  float scale;
  bool causal;
  RowReduce reduce;
  int64_t skip;            // leading keys excluded from the result
  const int32_t* lengths;  // [B], null: seqlen_k
  float* out;              // [B, Sk - skip], with none [B, H, R, Sk - skip]
  int32_t* largest;        // argmax: [B, H, R]
  float* exponents;        // workspace [B, H, R, Sk]
  float* statistics;       // CUDA workspace, [B, H, R] pairs

  TOKENMILL_HOST_DEVICE int64_t length(int64_t b) const {
    const int64_t n = lengths ? lengths[b] : seqlen_k;
    return n < 0 ? 0 : n > seqlen_k ? seqlen_k : n;
  }
  // Row r of a request of `length` keys sees the keys before end().
  TOKENMILL_HOST_DEVICE int64_t end(int64_t r, int64_t length) const {
    const int64_t end = r + length - rows + 1;
    return causal && end < length ? (end > 0 ? end : 0) : length;
  }
  // Factor from q.k to exponents. argmax only needs their order, and equal products must stay
  // equal.
  TOKENMILL_HOST_DEVICE float factor(float log2e) const {
    if (reduce == RowReduce::argmax) return scale > 0 ? 1 : scale < 0 ? -1 : 0;
    return scale * log2e;
  }
  // True if all weights of a row are 0.
  TOKENMILL_HOST_DEVICE bool gives_nothing(int64_t b, int64_t h, int64_t r) const {
    return lse && lse[b * lse_batch + h * lse_head + r] == -__builtin_huge_valf();
  }
};

// null, or an error message
const char* launch_cuda(const RowScoresParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(attention_row_scores, RowScoresParams)
