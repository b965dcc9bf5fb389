// Grid of a call, forward and backward, and the launch of the forward.
#pragma once
#include "cuda/refuse.cuh"
#include "sparse/block_sparse_attention/kernel_keys.cuh"
#include "sparse/listed_plan.cuh"
#include "sparse/listed_products.cuh"

namespace tokenmill::cuda::block_sparse_attention {

// Cuts the rows of a query block into tiles, with the smallest number of warps, between `least` and
// `most`, of `warp_rows` rows each that holds them.
inline BlockSparseLaunch plan_queries(const BlockSparseParams& d, int warp_rows, int minimum,
                                      int maximum) {
  BlockSparseLaunch launch{d};
  launch.factor = d.attention.scale * kLog2e;
  const int64_t block_q = int64_t{1} << d.log2_block_q;
  const int64_t queries = block_q < d.attention.seqlen_q ? block_q : d.attention.seqlen_q;
  const int64_t rows = queries * d.heads_together();
  launch.row_warps = minimum;
  while (launch.row_warps < maximum && warp_rows * launch.row_warps < rows) launch.row_warps *= 2;
  launch.tile_rows = warp_rows * launch.row_warps;
  launch.tiles = static_cast<int>(ceil_div(rows, launch.tile_rows));
  launch.query_blocks = ceil_div(d.attention.seqlen_q, block_q);
  return launch;
}

// Requires `aligned` to be set.
template <typename T>
bool has_compact_keys(const BlockSparseLaunch& d) {
  const AttentionParams& p = d.attention;
  const auto end = [&](const Rows& rows) {
    const int64_t page = rows.batch * d.pages.count + (rows.seq << d.pages.log2_size);
    return d.pages.table ? page : p.seqlen_k * rows.seq;
  };
  return d.aligned && is_compact<T>(end(p.k)) && is_compact<T>(end(p.v));
}

template <typename T, int kBucket>
BlockSparseLaunch plan_forward(const BlockSparseParams& d) {
  using Shape = ListedShape<T, kBucket>;
  const AttentionParams& p = d.attention;
  BlockSparseLaunch plan =
      plan_queries(d, Shape::kWarpRows, Shape::kMinRowWarps, Shape::kMaxRowWarps);
  plan.aligned = has_whole_chunks<T>(p.q, p.head_dim) && has_whole_chunks<T>(p.k, p.head_dim) &&
                 has_whole_chunks<T>(p.v, p.value_dim);
  plan.compact = has_compact_keys<T>(plan);
  plan.aligned_out = has_whole_chunks<T>(p.out, p.value_dim);
  return plan;
}

inline int64_t query_tiles(const BlockSparseLaunch& d) {
  const AttentionParams& p = d.attention;
  return (p.cu_seqlens_q ? 1 : p.batch) * (p.heads / d.heads_together()) * d.query_blocks * d.tiles;
}

inline const char* check_sizes(const BlockSparseParams& d) {
  const AttentionParams& p = d.attention;
  if (p.seqlen_q > kMaxLength)
    return refuse("q", "must have at most 2^29 tokens on CUDA", p.seqlen_q);
  if (p.seqlen_k > kMaxLength)
    return refuse("k", "must have at most 2^29 tokens on CUDA", p.seqlen_k);
  if (d.pages.table && d.pages.count << d.pages.log2_size > kMaxLength)
    return refuse("k", "must have at most 2^29 tokens in pages on CUDA",
                  d.pages.count << d.pages.log2_size);
  const int64_t listed = d.list.entries << d.log2_block_k;
  if (listed > kMaxLength)
    return refuse("indices", "must list at most 2^29 keys of a block on CUDA", listed);
  return nullptr;
}

// Such calls have separate kernels: packed requests, and paged keys.
inline bool has_requests(const BlockSparseParams& d) {
  return d.attention.cu_seqlens_q || d.pages.table;
}

// Compiled once for each element type (kernel*.cu).
template <typename T>
const char* launch_block_sparse(const BlockSparseParams& d, cudaStream_t stream);
template <typename T>
const char* launch_requests(const BlockSparseParams& d, cudaStream_t stream);

}  // namespace tokenmill::cuda::block_sparse_attention
