// Prefill: any number of queries per request, by the attention forward with a KV cache.
#pragma once
#include "dense/attention/kernel.cuh"
#include "dense/attention_decode/params.h"

namespace tokenmill::cuda {

// max_queries: see ForwardPlan.
template <typename T>
const char* launch_prefill(const DecodeParams& d, const MaskBounds& bounds, int max_queries,
                           cudaStream_t stream) {
  const AttentionParams& p = d.attention;
  return visit_forward_bucket(p, [&]<int kBucket>(Index<kBucket>) {
    return launch_forward<T, kBucket, Weights::any, true, T>(p, bounds, stream, d.cache,
                                                             max_queries);
  });
}

}  // namespace tokenmill::cuda
