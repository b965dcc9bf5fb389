// How the host cuts a call into blocks, forward and backward.
#pragma once
#include "cuda/refuse.cuh"
#include "sparse/block_sparse_attention/kernel_keys.cuh"
#include "sparse/listed_plan.cuh"

namespace tokenmill::cuda::block_sparse_attention {

// Tiles of the rows of a block of queries, by the least warps of `warp_rows` rows that hold them,
// `least` to `most`.
inline BlockSparseLaunch plan_queries(const BlockSparseParams& d, int warp_rows, int least,
                                      int most) {
  BlockSparseLaunch launch{d};
  launch.factor = d.attention.scale * kLog2e;
  const int64_t block_q = int64_t{1} << d.log2_block_q;
  const int64_t queries = block_q < d.attention.seqlen_q ? block_q : d.attention.seqlen_q;
  const int64_t rows = queries * d.heads_together();
  launch.row_warps = least;
  while (launch.row_warps < most && warp_rows * launch.row_warps < rows) launch.row_warps *= 2;
  launch.tile_rows = warp_rows * launch.row_warps;
  launch.tiles = static_cast<int>(ceil_div(rows, launch.tile_rows));
  launch.query_blocks = ceil_div(d.attention.seqlen_q, block_q);
  return launch;
}

// With `aligned` known.
template <typename T>
bool has_compact_keys(const BlockSparseLaunch& d) {
  const AttentionParams& p = d.attention;
  return d.aligned && is_compact<T>(p.seqlen_k * p.k.seq) && is_compact<T>(p.seqlen_k * p.v.seq);
}

inline int64_t query_tiles(const BlockSparseLaunch& d) {
  const AttentionParams& p = d.attention;
  return p.batch * (p.heads / d.heads_together()) * d.query_blocks * d.tiles;
}

inline const char* check_sizes(const BlockSparseParams& d) {
  const AttentionParams& p = d.attention;
  if (p.seqlen_q > kMaxLength)
    return refuse("q", "must have at most 2^29 tokens on CUDA", p.seqlen_q);
  if (p.seqlen_k > kMaxLength)
    return refuse("k", "must have at most 2^29 tokens on CUDA", p.seqlen_k);
  const int64_t listed = d.list.entries << d.log2_block_k;
  if (listed > kMaxLength)
    return refuse("indices", "must list at most 2^29 keys of a block on CUDA", listed);
  return nullptr;
}

}  // namespace tokenmill::cuda::block_sparse_attention
