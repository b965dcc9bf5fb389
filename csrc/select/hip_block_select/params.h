// Lists of blocks of keys by a search in a tree of blocks. Free of torch.
#pragma once
#include "core/rows.h"
#include "cpu/isa.h"
#include "select/keys.h"

namespace tokenmill {

enum class Representative : int32_t { first, middle, last };

// A list is that of one query head, or of the `group` query heads of one key head. Its query block
// speaks through every stride_q-th of its rows, counted backwards from the last.
struct HipParams {
  int64_t batch, lists, kv_heads, head_dim;
  int64_t group;                     // query heads of a list
  int64_t queries, block_q, blocks;  // blocks = ceil(Sq / block_q)
  int64_t stride_q;
  int64_t block_k, wanted;  // wanted = budget / block_k
  int64_t num_sink, num_recent;
  Representative representative;
  bool exact, causal;
  DType dtype;
  Rows q;
  KeyRows k;
  const int32_t* lengths;  // [B], clamped; null: all
  const int32_t* start;    // [B, lists, blocks, wanted]; null: search from scratch
  const int32_t* start_counts;
  int64_t start_strides[3], start_count_strides[3];
  int64_t restart_span;
  int32_t *indices, *counts;  // [B, lists, blocks, wanted], [B, lists, blocks]
};

// Queries first, first - stride_q, ... (`rows` of them) speak for a query block.
struct HipRows {
  int64_t first, rows;
};

TOKENMILL_HOST_DEVICE inline HipRows hip_rows(const HipParams& p, int64_t block) {
  const int64_t begin = block * p.block_q, end = begin + p.block_q;
  const int64_t last = (end < p.queries ? end : p.queries) - 1;
  return {last, (last - begin) / p.stride_q + 1};
}

// A query counts the keys num_sink .. end - 1.
TOKENMILL_HOST_DEVICE inline int64_t hip_end(const HipParams& p, int64_t tokens, int64_t query) {
  return tokens - p.num_recent + (p.causal ? query - p.queries + 1 : 0);
}

// Half-open intervals of blocks: what is admissible, and the nodes of a search.
struct HipNode {
  int32_t begin, end;
};

TOKENMILL_HOST_DEVICE inline HipNode hip_admissible(const HipParams& p, int64_t end) {
  if (end <= p.num_sink) return {0, 0};
  return {static_cast<int32_t>(p.num_sink / p.block_k),
          static_cast<int32_t>(ceil_div(end, p.block_k))};
}

TOKENMILL_HOST_DEVICE inline int32_t hip_representative(const HipParams& p, HipNode node) {
  return p.representative == Representative::first  ? node.begin
         : p.representative == Representative::last ? node.end - 1
                                                    : node.begin + (node.end - node.begin) / 2;
}

// The node that block `id` of a list becomes.
TOKENMILL_HOST_DEVICE inline HipNode hip_restart_node(const HipParams& p, HipNode admissible,
                                                      int32_t id) {
  const int64_t begin = id / p.restart_span * p.restart_span, end = begin + p.restart_span;
  return {begin > admissible.begin ? static_cast<int32_t>(begin) : admissible.begin,
          end < admissible.end ? static_cast<int32_t>(end) : admissible.end};
}

// null, or what went wrong
const char* launch_cuda(const HipParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(hip_block_select, HipParams)
