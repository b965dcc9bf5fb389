// Launch of the sm_90a forward.
#pragma once
#include <cuda_runtime.h>

#include "attention/score_map.cuh"
#include "cuda/sequences.cuh"
#include "dense/attention/head_dim.cuh"
#include "dense/attention/rules_sm90.h"

namespace tokenmill::cuda {

// Calls visit(Index<kDim>{}) with the smallest compiled dimension >= head_dim.
template <typename Visit, int... kDims>
auto visit_sm90_dim(int64_t head_dim, const Visit& visit, HeadDimList<kDims...>) {
  return visit_least_dim<kDims...>(head_dim, visit);
}
template <typename Visit>
auto visit_sm90_dim(int64_t head_dim, const Visit& visit) {
  return visit_sm90_dim(head_dim, visit, Sm90HeadDims{});
}

// cache: the KV cache (p then has no keys); without one its seqlens are null. Of packed requests
// with a cache it takes those with kMinSm90Tokens queries or more, so that the bits of a request do
// not depend on its batch.
template <typename T, Weights kWeights>
const char* launch_forward_sm90(const AttentionParams& p, const KvCache& cache,
                                cudaStream_t stream);

// The same for the dtype and the map of the call (cuda_sm90.cu). Returns null, kNotMapped, or an
// error message.
const char* launch_forward_sm90(const AttentionParams& p, const KvCache& cache,
                                cudaStream_t stream);

}  // namespace tokenmill::cuda
