#pragma once
#include "core/kv_cache.h"
#include "cpu/isa.h"
#include "select/keys.h"

namespace tokenmill {

enum class HeadReduce : int32_t { none, group_max, group_mean, softmax_vote };

// Rows of k are keys, or boxes (minimum, maximum) of several tokens. The scores of block_rows rows
// are reduced to one per block, and the scores of block_q queries to one per row.
struct BlockScoreParams {
  int64_t batch, heads, kv_heads, head_dim;
  int64_t queries;             // Sq
  int64_t block_q, rows;       // rows = ceil(Sq / block_q)
  int64_t block_rows, blocks;  // blocks = ceil(k.rows / block_rows)
  int64_t row_tokens;          // tokens per row of k
  bool boxes, mean_q, causal;  // mean_q: queries are averaged; else the maximum of their scores
  HeadReduce head_reduce;
  DType dtype, k_dtype;  // k_dtype: same as dtype, or float8_e4m3fn
  float scale;
  Rows q;
  KeyRows k;
  CacheScale k_scale;  // strides of pages and their rows, or of requests and rows
  int64_t k_half;      // offset from a minimum to its maximum
  int64_t num_sink, num_recent;
  const int32_t* lengths;  // [B], tokens, clamped; null: all
  float* out;              // [B, heads of the result, rows, blocks]
  float* scores;           // [B, H, rows, blocks], for softmax_vote
  void* workspace;         // CUDA only
};

// Rows of k that a query sees: begin .. end - 1.
struct SeenRows {
  int64_t begin, end;
};

TOKENMILL_HOST_DEVICE inline int64_t tokens_of(const BlockScoreParams& p, int64_t b) {
  return clamped_length(p.lengths, b, p.k.rows * p.row_tokens);
}

TOKENMILL_HOST_DEVICE inline SeenRows seen_rows(const BlockScoreParams& p, int64_t tokens,
                                                int64_t query) {
  const int64_t end = tokens - p.num_recent + (p.causal ? query - p.queries + 1 : 0);
  return {p.num_sink / p.row_tokens, end > p.num_sink ? ceil_div(end, p.row_tokens) : 0};
}

TOKENMILL_HOST_DEVICE inline int64_t last_query(const BlockScoreParams& p, int64_t row) {
  const int64_t end = (row + 1) * p.block_q;
  return (end < p.queries ? end : p.queries) - 1;
}

// Score rows per row of the result, and per result: over queries and over heads.
TOKENMILL_HOST_DEVICE inline int64_t queries_of_row(const BlockScoreParams& p) {
  return p.mean_q ? 1 : p.block_q;
}
TOKENMILL_HOST_DEVICE inline bool reduces_group(const BlockScoreParams& p) {
  return p.head_reduce == HeadReduce::group_max || p.head_reduce == HeadReduce::group_mean;
}

// CUDA workspace in bytes.
int64_t workspace_bytes(const BlockScoreParams&);

// null, or an error message
const char* launch_cuda(const BlockScoreParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(kv_block_scores, BlockScoreParams)
