// Conditions of the sm_90a backward, and its launch.
#pragma once
#include <cuda_runtime.h>

#include "dense/attention/launch_sm90.h"
#include "dense/attention/params_backward_sm90.h"

namespace tokenmill::cuda {

// Rows of a query tile.
constexpr int sm90_tile_queries(int64_t head_dim) { return head_dim <= 64 ? 128 : 64; }
// Number of query tiles over all heads, each with its own dQ accumulator; packed: an upper bound.
inline int64_t sm90_query_tiles(const AttentionParams& p) {
  return (p.cu_seqlens_q ? 1 : p.batch) * p.heads *
         max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, sm90_tile_queries(p.head_dim));
}
// Floats in one tile's dQ accumulator, head_dim rounded up to whole 64-column boxes.
constexpr int sm90_tile_floats(int64_t head_dim) {
  return static_cast<int>(sm90_tile_queries(head_dim) * ((head_dim + 63) / 64 * 64));
}
// dQ accumulators, then the number of CTAs started and one turn counter per accumulator.
inline int64_t sm90_workspace_bytes(const AttentionParams& p) {
  return 4 * (sm90_query_tiles(p) * (sm90_tile_floats(p.head_dim) + 1) + 1);
}

// The conditions of python/tokenmill/dense/attention_kernels.py, and that dout can be mapped.
inline bool takes_sm90(const AttentionBackwardParams& bp) {
  const AttentionParams& p = bp.forward;
  if (!is_sm90_attention(p) || !has_sm90_dim(p.head_dim)) return false;
  if (p.softcap > 0) {
    const bool sums_slopes = bp.dscore_bias && p.map != ScoreMap::softmax;
    if (!has_sm90_scale(p) || sums_slopes) return false;
  }
  if (sm90_query_tiles(p) > 0x7fffffff) return false;
  return Sm90Tensors(p, bp.dout).can_be_mapped();
}

template <typename T, Weights kWeights>
const char* launch_backward_sm90(const Sm90Backward& call, cudaStream_t stream);

}  // namespace tokenmill::cuda
