// Lists of key blocks, found by a search in a tree of blocks. Free of torch.
#pragma once
#include "core/rows.h"
#include "cpu/isa.h"
#include "select/keys.h"

namespace tokenmill {

enum class Representative : int32_t { first, middle, last };

// A list belongs to one query head, or to the `group` query heads of one KV head. A query block is
// scored by every stride_q-th of its rows, counted backwards from the last. Lists of packed queries
// have no request dimension: the blocks of sequence b begin at index cu_seqlens_q[b] / block_q + b,
// and blocks of no sequence are empty.
struct HipParams {
  int64_t batch, lists, kv_heads, head_dim;
  int64_t group;                     // query heads per list
  int64_t queries, block_q, blocks;  // per request; packed: of all sequences
  int64_t stride_q;
  int64_t block_k, wanted;  // wanted = budget / block_k
  int64_t num_sink, num_recent;
  Representative representative;
  bool exact, causal;
  DType dtype;
  Rows q;
  KeyRows k;                                   // packed: rows of all sequences
  const int32_t* lengths;                      // [B], clamped; null: all
  const int32_t* query_counts;                 // [B], clamped; null: all
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [B + 1]; null unless packed
  const int32_t* start;  // [B, lists, blocks, wanted]; null: search from scratch
  const int32_t* start_counts;
  int64_t start_strides[3], start_count_strides[3];
  int64_t restart_span;
  int32_t *indices, *counts;  // [B, lists, blocks, wanted], [B, lists, blocks]
  void* workspace;            // CUDA

  // Request dimension of the lists.
  TOKENMILL_HOST_DEVICE int64_t requests() const { return cu_seqlens_q ? 1 : batch; }
};

// Query block of a list: offsets and sizes of its request.
struct HipBlock {
  int64_t b, block;          // request, and block within it
  int64_t q_start, queries;  // row of the first query, number of queries
  int64_t k_start, tokens;   // row of the first key, number of keys
};

// Block number `block` of the lists of request b.
TOKENMILL_HOST_DEVICE inline HipBlock hip_block(const HipParams& p, int64_t b, int64_t block) {
  HipBlock at{b, block, 0, p.queries, 0, 0};
  if (p.cu_seqlens_q) {
    int64_t low = 0, high = p.batch;  // the last sequence that begins at or before `block`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      const bool begun =
          packed_end(p.cu_seqlens_q, middle, p.queries) / p.block_q + middle <= block;
      (begun ? low : high) = middle;
    }
    at.b = low;
    at.q_start = packed_end(p.cu_seqlens_q, low, p.queries);
    at.queries = packed_end(p.cu_seqlens_q, low + 1, p.queries) - at.q_start;
    at.block = block - (at.q_start / p.block_q + low);
  } else {
    at.queries = clamped_length(p.query_counts, b, p.queries);
  }
  at.tokens = clamped_length(p.lengths, at.b, p.k.rows);
  if (p.cu_seqlens_k) {
    at.k_start = packed_end(p.cu_seqlens_k, at.b, p.k.rows);
    const int64_t tokens = packed_end(p.cu_seqlens_k, at.b + 1, p.k.rows) - at.k_start;
    at.tokens = tokens < 0 ? 0 : tokens;
  }
  return at;
}

// Queries first, first - stride_q, ... of the request (`rows` of them) score a query block.
struct HipRows {
  int64_t first, rows;
};

TOKENMILL_HOST_DEVICE inline HipRows hip_rows(const HipParams& p, const HipBlock& at) {
  const int64_t begin = at.block * p.block_q, end = begin + p.block_q;
  if (begin < 0 || begin >= at.queries) return {0, 0};
  const int64_t last = (end < at.queries ? end : at.queries) - 1;
  return {last, (last - begin) / p.stride_q + 1};
}

// A query sees the candidate keys num_sink .. end - 1.
TOKENMILL_HOST_DEVICE inline int64_t hip_end(const HipParams& p, const HipBlock& at,
                                             int64_t query) {
  return at.tokens - p.num_recent + (p.causal ? query - at.queries + 1 : 0);
}

// Half-open interval of blocks: the admissible range, or a node of a search.
struct HipNode {
  int32_t begin, end;
};

// Admissible blocks of a query block with `rows`, whose last query sees the keys before `end`.
TOKENMILL_HOST_DEVICE inline HipNode hip_admissible(const HipParams& p, HipRows rows, int64_t end) {
  if (rows.rows == 0 || end <= p.num_sink) return {0, 0};
  return {static_cast<int32_t>(p.num_sink / p.block_k),
          static_cast<int32_t>(ceil_div(end, p.block_k))};
}

TOKENMILL_HOST_DEVICE inline int32_t hip_representative(const HipParams& p, HipNode node) {
  return p.representative == Representative::first  ? node.begin
         : p.representative == Representative::last ? node.end - 1
                                                    : node.begin + (node.end - node.begin) / 2;
}

// Start node for block `id` of a start list.
TOKENMILL_HOST_DEVICE inline HipNode hip_restart_node(const HipParams& p, HipNode admissible,
                                                      int32_t id) {
  const int64_t begin = id / p.restart_span * p.restart_span, end = begin + p.restart_span;
  return {begin > admissible.begin ? static_cast<int32_t>(begin) : admissible.begin,
          end < admissible.end ? static_cast<int32_t>(end) : admissible.end};
}

// null, or an error message
const char* launch_cuda(const HipParams&, void* stream);
int64_t workspace_bytes(const HipParams&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(hip_block_select, HipParams)
