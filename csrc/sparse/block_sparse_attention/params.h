// Attention of query blocks to listed key blocks. Free of torch.
#pragma once
#include "sparse/listed.h"

namespace tokenmill {

// Query i of a request sees the sink keys [0, sinks), the keys of its list in [sinks, listed), and
// the recent keys [listed, end). None of the three bounds decreases with i.
struct SeenKeys {
  int64_t sinks, listed, end;
};

// Key x of a request is row x % 2^log2_size of a page. Pages are Rows::batch apart.
struct KeyPages {
  const int32_t* table;  // [B, pages per request], null: keys are not paged
  int64_t stride, count;
  int32_t log2_size;

  TOKENMILL_HOST_DEVICE int64_t page(int64_t b, int64_t x) const {
    return table[b * stride + (x >> log2_size)];
  }
  TOKENMILL_HOST_DEVICE int64_t row(int64_t x) const { return x & ((int64_t{1} << log2_size) - 1); }
};

struct BlockSparseParams : ListedAttention {
  KeyPages pages;
  const int32_t* lengths;  // [B], or null: all keys
  int64_t lse_rows;        // rows per head in lse: queries of all requests if packed
  int32_t log2_block_q, log2_block_k;
  bool causal;
  int64_t num_sink, num_recent;  // num_recent only with causal

  TOKENMILL_HOST_DEVICE int64_t length(int64_t b) const {
    if (!lengths) return attention.seqlen_k;
    const int64_t n = lengths[b];
    return n < 0 ? 0 : n > attention.seqlen_k ? attention.seqlen_k : n;
  }
  TOKENMILL_HOST_DEVICE int64_t key_blocks() const {
    return (attention.seqlen_k + (int64_t{1} << log2_block_k) - 1) >> log2_block_k;
  }
  // Number of visible (query, key) pairs if lists and requests are full.
  double max_pairs() const {
    const AttentionParams& p = attention;
    double keys = static_cast<double>(list.entries << log2_block_k) +
                  static_cast<double>(num_sink) + static_cast<double>(num_recent);
    if (keys > static_cast<double>(p.seqlen_k)) keys = static_cast<double>(p.seqlen_k);
    return keys * static_cast<double>(p.batch * p.heads * p.seqlen_q);
  }
  TOKENMILL_HOST_DEVICE SeenKeys seen(int64_t b, int64_t i) const {
    const int64_t n = length(b);
    return seen_from(n - attention.seqlen_q + i, n);
  }
  // Keys seen by a query at a position, in a request of n keys.
  TOKENMILL_HOST_DEVICE SeenKeys seen_from(int64_t position, int64_t n) const {
    int64_t end = causal ? position + 1 : n;
    if (end < 0) end = 0;
    const int64_t sinks = num_sink < end ? num_sink : end;
    const int64_t listed = causal && num_recent > 0 ? end - num_recent : end;
    return {sinks, listed < sinks ? sinks : listed, end};
  }
};

struct BlockSparseBackwardParams {
  BlockSparseParams forward;  // includes out and lse
  Rows dout;
  const float* dlse;  // layout of lse, or null
  Rows dq, dk, dv;    // dtype of q
  float* dsink;       // [B, H], sums over the rows of a request, or null
  float* delta;       // CPU, with dsink: workspace with the layout of lse
  // CUDA: transposed lists from transpose_block_list, [B, heads, blocks + 1] and
  // [B, heads, rows * entries], and workspace.
  const int32_t *offsets, *rows;
  void* workspace;
};

// null, or an error message
const char* launch_cuda(const BlockSparseParams&, void* stream);
const char* launch_cuda(const BlockSparseBackwardParams&, void* stream);
int64_t workspace_bytes(const BlockSparseBackwardParams&);

}  // namespace tokenmill
