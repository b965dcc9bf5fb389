// Latent heads with a list for each query: the query is a request of sparse_decode_attention, whose
// cache ends behind the last key that it sees. Free of torch.
#pragma once
#include "sparse/block_sparse_attention/params.h"
#include "sparse/sparse_decode_attention/params.h"

namespace tokenmill {

// attention.batch counts queries and attention.seqlen_q is 1. What belongs to a request is that of
// the request of the query.
struct LatentBlockSparse : SparseDecodeParams {
  int64_t queries;   // of a request: query i of request b is number b * queries + i
  int64_t lse_rows;  // of a head in lse
  bool causal;
  int64_t indices_row, counts_row;  // from query to query

  TOKENMILL_HOST_DEVICE QueryPlace place(int64_t n) const {
#if defined(__CUDA_ARCH__)  // fewer than 2^31 queries
    const uint32_t all = static_cast<uint32_t>(n), each = static_cast<uint32_t>(queries);
    return {all / each, all % each};
#else
    return {n / queries, n % queries};
#endif
  }
  TOKENMILL_HOST_DEVICE QueryPlace place(int64_t n, int64_t) const { return place(n); }
  TOKENMILL_HOST_DEVICE int64_t lse_at(int64_t n, int64_t, int64_t h) const {
    const QueryPlace at = place(n);
    return (at.b * attention.heads + h) * lse_rows + at.i;
  }
  TOKENMILL_HOST_DEVICE int64_t length(int64_t n) const {
    const QueryPlace at = place(n);
    const int64_t keys = cache.seqlens ? cache.length(at.b) : cache.capacity;
    const int64_t end = causal ? keys + at.i + 1 - queries : keys;
    return end < 0 ? 0 : end;
  }
  TOKENMILL_HOST_DEVICE KvCache::Slot find(int64_t n, int64_t position) const {
    return cache.find(place(n).b, position);
  }
  TOKENMILL_HOST_DEVICE const int32_t* list(int64_t n, int64_t h) const {
    const QueryPlace at = place(n);
    return SparseDecodeParams::list(at.b, h) + at.i * indices_row;
  }
  TOKENMILL_HOST_DEVICE int64_t count(int64_t n, int64_t h) const {
    const QueryPlace at = place(n);
    const int64_t head = list_heads == 1 ? 0 : h;
    const int64_t own = counts[at.b * counts_batch + head * counts_head + at.i * counts_row];
    return own < 0 ? 0 : own > entries ? entries : own;
  }
};

// null, or what went wrong
const char* launch_cuda(const LatentBlockSparse&, void* stream);
int64_t workspace_bytes(const LatentBlockSparse&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(block_sparse_attention_latent, LatentBlockSparse)
