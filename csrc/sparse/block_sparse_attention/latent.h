// Latent heads with a list per query: each query is a request of sparse_decode_attention whose
// cache ends after the last key that the query sees. Free of torch.
#pragma once
#include "sparse/block_sparse_attention/params.h"
#include "sparse/sparse_decode_attention/params.h"

namespace tokenmill {

// attention.batch counts queries, and attention.seqlen_q is 1. Per-request fields are indexed by
// the request of the query.
struct LatentBlockSparse : SparseDecodeParams {
  int64_t queries;   // per request: query i of request b has index b * queries + i
  int64_t lse_rows;  // rows per head in lse
  bool causal;
  int64_t indices_row, counts_row;  // strides between queries
  // Packed requests, else null. Query indices are tokens; requests[n] is the request of query n,
  // -1: none. On CUDA the launch computes it.
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *requests;
  int64_t num_requests;

  // Row of query n in q, out and lse.
  TOKENMILL_HOST_DEVICE QueryPlace place(int64_t n) const {
    if (cu_seqlens_q) return {0, n};
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
  TOKENMILL_HOST_DEVICE int64_t request(int64_t n) const {
    return cu_seqlens_q ? requests[n] : place(n).b;
  }
  TOKENMILL_HOST_DEVICE int64_t length(int64_t n) const {
    const int64_t b = request(n);
    if (b < 0) return 0;
    int64_t keys = cache.seqlens ? cache.length(b) : cache.capacity;
    if (cu_seqlens_k) keys = first_key(b + 1) - first_key(b);
    if (causal) keys -= queries_behind(b, n);
    return keys < 0 ? 0 : keys;
  }
  TOKENMILL_HOST_DEVICE KvCache::Slot find(int64_t n, int64_t position) const {
    if (cu_seqlens_k) return {0, static_cast<int32_t>(first_key(request(n)) + position)};
    return cache.find(request(n), position);
  }
  TOKENMILL_HOST_DEVICE const int32_t* list(int64_t n, int64_t h) const {
    const QueryPlace at = list_place(n);
    return SparseDecodeParams::list(at.b, h) + at.i * indices_row;
  }
  TOKENMILL_HOST_DEVICE int64_t count(int64_t n, int64_t h) const {
    const QueryPlace at = list_place(n);
    const int64_t head = list_heads == 1 ? 0 : h;
    const int64_t own = counts[at.b * counts_batch + head * counts_head + at.i * counts_row];
    return own < 0 ? 0 : own > entries ? entries : own;
  }

  // Packed request of query n. For any contents of cu_seqlens_q, the returned request begins at or
  // before the query and ends after it.
  TOKENMILL_HOST_DEVICE int32_t find_request(int64_t n) const {
    if (n < cu_seqlens_q[0] || n >= cu_seqlens_q[num_requests]) return -1;
    int64_t low = 0, high = num_requests;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      n < cu_seqlens_q[middle] ? high = middle : low = middle;
    }
    return static_cast<int32_t>(low);
  }

 private:
  TOKENMILL_HOST_DEVICE int64_t queries_behind(int64_t b, int64_t n) const {
    return cu_seqlens_q ? cu_seqlens_q[b + 1] - n - 1 : queries - place(n).i - 1;
  }
  // First packed key of request b.
  TOKENMILL_HOST_DEVICE int64_t first_key(int64_t b) const {
    const int64_t at = cu_seqlens_k[b];
    return at < 0 ? 0 : at > cache.capacity ? cache.capacity : at;
  }
  // Row of lists of query n. A packed request has one row of lists more than queries.
  TOKENMILL_HOST_DEVICE QueryPlace list_place(int64_t n) const {
    if (!cu_seqlens_q) return place(n);
    const int64_t b = request(n);
    return {0, n + (b < 0 ? 0 : b)};
  }
};

// null, or an error message
const char* launch_cuda(const LatentBlockSparse&, void* stream);
int64_t workspace_bytes(const LatentBlockSparse&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(block_sparse_attention_latent, LatentBlockSparse)
