#pragma once
#include "attention/band.h"
#include "attention/params.h"
#include "core/kv_cache.h"

namespace tokenmill {

// Row of a query in q and out.
struct QueryPlace {
  int64_t b, i;
};

// Queries of requests against the KV cache of each. Where a query is a request of its own, a
// derived record maps its place, and hides these functions.
struct CacheAttention {
  AttentionParams attention;  // k, v and seqlen_k describe the cache; no bias
  KvCache cache;

  TOKENMILL_HOST_DEVICE int64_t length(int64_t b) const { return cache.length(b); }
  // Row of query i of request b.
  TOKENMILL_HOST_DEVICE QueryPlace place(int64_t b, int64_t i) const { return {b, i}; }
  // Index in an unpacked lse of query i in head h.
  TOKENMILL_HOST_DEVICE int64_t lse_at(int64_t b, int64_t i, int64_t h) const {
    return (b * attention.heads + h) * attention.seqlen_q + i;
  }
};

struct DecodeParams : CacheAttention {
  // CPU: requests to answer, or null: all. Kernels for few rows take requests with exactly
  // `queries` queries each.
  const int32_t* requests;
  int64_t num_requests, queries;
  int64_t num_splits;    // 0: automatic
  bool stream_k;         // CUDA: stream-K, ranges of equal length over all requests
  void* workspace;       // CUDA
  int64_t max_seqlen_q;  // CUDA: upper bound on the queries of a request
};

// Band of keys for `queries` queries of a request with `length` keys.
TOKENMILL_HOST_DEVICE inline Band decode_band(const AttentionParams& p, int64_t queries,
                                              int64_t length) {
  return Band::of_window(p.window_left, p.window_right, queries, length);
}

// Keys that any query of a request sees. part(): the range of steps first_step .. last_step - 1, of
// `step` keys each.
struct KeyRange {
  int64_t begin, end;

  TOKENMILL_HOST_DEVICE static KeyRange of(const Band& band) {
    const int64_t begin = band.begin(0);
    return {begin, begin < band.columns ? band.columns : begin};
  }
  TOKENMILL_HOST_DEVICE int64_t steps(int64_t step) const { return ceil_div(end - begin, step); }
  TOKENMILL_HOST_DEVICE KeyRange part(int64_t first_step, int64_t last_step, int64_t step) const {
    const int64_t last = begin + last_step * step;
    return {begin + first_step * step, last < end ? last : end};
  }
};

// Returns null or an error message.
const char* launch_cuda(const DecodeParams&, void* stream);
int64_t workspace_bytes(const DecodeParams&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(attention_decode, DecodeParams)
TOKENMILL_CPU_KERNEL(attention_prefill, DecodeParams)  // any number of queries each
