#pragma once
#include "core/rows.h"
#include "cpu/isa.h"
#include "select/keys.h"

namespace tokenmill {

// Score of query i and key j: sum over heads h of weight[i, h] act(q[i, h] . k[j]). A list has ids
// of blocks of block_k keys, each scored by the maximum over its keys that the query sees. Queries
// are numbered over all sequences; these are the rows of the results.
struct IndexerParams {
  int64_t batch, heads, head_dim;
  int64_t tokens;   // queries of all sequences
  int64_t queries;  // per sequence, unless packed
  int64_t topk, block_k;
  bool causal, relu;
  DType dtype, key_dtype, weight_dtype;  // keys: dtype of queries, or float8_e4m3fn
  Rows q, weights;                       // [B, Sq, H, D]; [B, Sq, H]
  KeyRows k;                             // packed: rows of all sequences
  KeyRows k_scale;                       // float32, for float8_e4m3fn keys; data null: 1
  Rows previous;                         // [B, Sq, hints], any numbers; data null: none
  int64_t hints;
  const int32_t* lengths;        // [B], clamped; null: all
  const int32_t* cu_seqlens_q;   // [B + 1]; null unless packed
  const int32_t* cu_seqlens_k;   // [B + 1]; null unless keys are packed
  int64_t num_sink, num_recent;  // at most 2^31
  int32_t *indices, *counts;     // [tokens, topk], -1 past the last; [tokens]
  float* values;                 // [tokens, topk], -inf past the last; null: not wanted
  void* workspace;               // CUDA only
};

// First query and key row of a sequence, and their numbers.
struct IndexerSequence {
  int64_t q_start, queries, k_start, keys;
};

TOKENMILL_HOST_DEVICE inline IndexerSequence indexer_sequence(const IndexerParams& p, int64_t b) {
  IndexerSequence s{b * p.queries, p.queries, 0, clamped_length(p.lengths, b, p.k.rows)};
  if (p.cu_seqlens_q) {
    s.q_start = packed_end(p.cu_seqlens_q, b, p.tokens);
    s.queries = packed_end(p.cu_seqlens_q, b + 1, p.tokens) - s.q_start;
    s.queries = s.queries < 0 ? 0 : s.queries;
  }
  if (p.cu_seqlens_k) {
    s.k_start = packed_end(p.cu_seqlens_k, b, p.k.rows);
    s.keys = packed_end(p.cu_seqlens_k, b + 1, p.k.rows) - s.k_start;
    s.keys = s.keys < 0 ? 0 : s.keys;
  }
  return s;
}

// Keys visible to query i of the sequence and eligible for its list: begin .. end - 1.
struct SeenKeys {
  int64_t begin, end;
};

TOKENMILL_HOST_DEVICE inline SeenKeys seen_keys(const IndexerParams& p, const IndexerSequence& s,
                                                int64_t i) {
  const int64_t end = s.keys - p.num_recent + (p.causal ? i - s.queries + 1 : 0);
  return end > p.num_sink ? SeenKeys{p.num_sink, end} : SeenKeys{0, 0};
}

// Offset of query i of a sequence, in elements.
TOKENMILL_HOST_DEVICE inline int64_t query_offset(const IndexerParams& p, const Rows& rows,
                                                  const IndexerSequence& s, int64_t b, int64_t i) {
  return p.cu_seqlens_q ? (s.q_start + i) * rows.seq : b * rows.batch + i * rows.seq;
}

// Upper bound of the block ids in a list.
TOKENMILL_HOST_DEVICE inline int64_t indexer_blocks(const IndexerParams& p) {
  return ceil_div(p.k.rows, p.block_k);
}

// CUDA workspace in bytes, on the current device.
int64_t workspace_bytes(const IndexerParams&);

// null, or an error message
const char* launch_cuda(const IndexerParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(indexer_topk_select, IndexerParams)
