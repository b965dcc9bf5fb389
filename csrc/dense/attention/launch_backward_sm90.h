// Which calls the backward of compute capability 9.0a takes, and their launch.
#pragma once
#include <cuda_runtime.h>

#include "dense/attention/launch_sm90.h"
#include "dense/attention/params_backward_sm90.h"

namespace tokenmill::cuda {

// visit(Index<kDim>{}) with the head dimension of a backward, of those that have a kernel: dK and
// dV of 64 keys take kDim registers of a thread.
template <typename Visit>
auto visit_sm90_backward_dim(int64_t head_dim, const Visit& visit) {
  return visit_least_dim<64, 96, 128>(head_dim, visit);
}
inline bool has_sm90_backward_dim(int64_t head_dim) {
  return visit_sm90_backward_dim(head_dim, [&](auto dim) { return dim == head_dim; });
}

// Queries of a tile.
constexpr int sm90_tile_queries(int64_t head_dim) { return head_dim <= 64 ? 128 : 64; }
// Tiles of queries of all heads, each with its sums of dQ; packed: a bound on them.
inline int64_t sm90_query_tiles(const AttentionParams& p) {
  return (p.cu_seqlens_q ? 1 : p.batch) * p.heads *
         max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, sm90_tile_queries(p.head_dim));
}
constexpr int64_t kSm90TileFloats = 8192;
// Behind the sums come counters of blocks: of those that have begun, and of those in each sum.
inline int64_t sm90_workspace_bytes(const AttentionParams& p) {
  return 4 * (sm90_query_tiles(p) * (kSm90TileFloats + 1) + 1);
}

// The rules of python/tokenmill/dense/attention_kernels.py, which does not know dout.
inline bool takes_sm90(const AttentionBackwardParams& bp) {
  const AttentionParams& p = bp.forward;
  if (!is_sm90_attention(p) || !has_sm90_backward_dim(p.head_dim)) return false;
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
