#pragma once
#include "core/dtype.h"
#include "core/rows.h"
#include "cpu/isa.h"

namespace tokenmill {

// Weight f(z) of a logit z, and the normalisation of a row of weights (softmax has its own).
enum class ScoreMap : int32_t { softmax, sigmoid, relu, elu1, linear, taylor2 };
enum class Normalize : int32_t { none, sum, count };

constexpr float kSumEpsilon = 1e-8f;  // added to a row sum

// Mask of ranges and spans, on top of the causal/window band. Key j is visible if begin <= j < end
// for one of the query's `count` ranges (begin, end), and if the id spans (first, last) of query
// and key intersect. Null: rule absent. Strides in elements, 0 where broadcast; rows of queries and
// keys are contiguous, in token order where packed.
struct PairMask {
  const int32_t* ranges;  // [B | 1, H | 1, Sq, count, 2], packed [1, H | 1, Tq, count, 2]
  int64_t count, ranges_batch, ranges_head;
  const int32_t *q_spans, *k_spans;  // [B | 1, Sq, 2], [B | 1, Sk, 2], packed [1, T, 2]
  int64_t q_spans_batch, k_spans_batch;

  TOKENMILL_HOST_DEVICE constexpr bool any() const { return ranges || q_spans; }
};

// Two-dimensional positions: row i / width, column i % width. width 0: positions lie on a line.
struct Grid {
  int64_t width = 0;
  bool manhattan = false;  // |dy| + |dx|, else max(|dy|, |dx|)
  int64_t window = -1;     // pairs farther apart are masked; -1: no limit
};

// Grid rows are computed in float32: (i + 0.5) / width must not round to a whole number.
constexpr int64_t kMaxCells = int64_t{1} << 21;

constexpr int64_t kMaxRanges = 4;

struct AttentionParams {
  int64_t batch, heads, kv_heads;  // batch counts sequences
  int64_t seqlen_q, seqlen_k;      // packed: all tokens
  int64_t head_dim, value_dim;
  DType dtype;
  ScoreMap map;
  Normalize normalize;
  Rows q, k, v, out;
  // Row statistic, [B, H, Sq], packed [H, Tq]. softmax: log-sum-exp; Normalize::sum: sum of f(z);
  // Normalize::count: number of visible keys. Null for other calls.
  float* lse;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [B + 1], null unless packed

  float scale, softcap;
  float score_bias_value;
  bool score_bias_neg_log_n;
  const float* score_bias;  // [H] or [B, H]: score_bias_batch is 0 or H
  int64_t score_bias_batch;
  const float* alibi_slopes;
  int64_t alibi_batch;
  Grid grid;          // metric of the ALiBi distances
  const float* sink;  // [H]
  const void* bias;   // [B|1, H|1, Sq|1, Sk|1], stride 0 where broadcast
  DType bias_dtype;
  int64_t bias_batch, bias_head, bias_q, bias_k;
  // extent of bias; larger than any sequence where it is broadcast
  int64_t bias_rows, bias_columns;
  PairMask mask;
  int64_t window_left, window_right;  // -1: no limit; causal is right = 0
  bool fast;
  // ALiBi as a decay: slopes leave the logits unchanged; the normalised softmax weights are
  // multiplied by e^(-slope distance). lse is the log-sum-exp of the weights without decay.
  bool post_decay;
};

struct AttentionBackwardParams {
  AttentionParams forward;  // out (softmax, sum) and lse are the forward's results
  Rows dout;
  const float* dlse;  // like lse (softmax, sum), or null
  Rows dq, dk, dv;    // in the dtype of q
  // Sums over all pairs of one (b, h), [B, H] each, or null. dbias has the shape of bias.
  float *dscore_bias, *dalibi_slopes, *dsink;
  float* dbias;
  int64_t dbias_batch, dbias_head, dbias_q, dbias_k;
  // Workspace of the CUDA backward. minus_lse: minus the log-sum-exp without the constant that all
  // scores of a row share (other maps: factor of the row's weights); minus_delta: minus delta; both
  // shaped like lse. sums: two sums over pairs for each 16 rows of each head, or null.
  float *minus_lse, *minus_delta, *sums;
};

constexpr bool has_row_statistic(const AttentionParams& p) {
  return p.map == ScoreMap::softmax || p.normalize != Normalize::none;
}

// True if the CUDA backward needs minus_lse and minus_delta.
TOKENMILL_HOST_DEVICE inline bool has_backward_statistics(const AttentionParams& p) {
  return p.map != ScoreMap::sigmoid || p.normalize != Normalize::none;
}

// Number of 16-row blocks of one head, in one sequence or in all packed sequences.
constexpr int64_t blocks_of_sums(const AttentionParams& p) {
  return p.cu_seqlens_q ? p.seqlen_q / 16 + p.batch : ceil_div(p.seqlen_q, 16);
}

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(attention_forward, AttentionParams)
TOKENMILL_CPU_KERNEL(attention_backward, AttentionBackwardParams)
