// Grid and row statistics of the backward, and its launch.
#pragma once
#include "attention/backward_statistics.cuh"
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernel_queries.cuh"
#include "sparse/listed_backward.cuh"

namespace tokenmill::cuda::block_sparse_attention {

// Row warps of a key tile: more than 64 keys only if they all belong to one key block.
inline int key_row_warps(const BlockSparseParams& d, int maximum) {
  int warps = d.log2_block_k > 6 ? 8 : 4;
  if (warps > maximum) warps = maximum;
  while (warps > 1 && 8 * warps >= d.attention.seqlen_k) warps /= 2;
  return warps;
}

// Grid of the query-side kernel.
template <typename T, int kBucket>
BlockSparseGradients plan_query_side(const BlockSparseBackwardParams& bp,
                                     const BlockSparseGradients& g) {
  using Queries = QuerySideShape<T, kBucket>;
  const AttentionParams& p = bp.forward.attention;
  BlockSparseGradients d = g;
  static_cast<BlockSparseLaunch&>(d) =
      plan_queries(bp.forward, Queries::kWarpRows, 1, Queries::kMaxRowWarps);
  d.aligned = has_whole_chunks<T>(p.q, p.head_dim) && has_whole_chunks<T>(p.k, p.head_dim) &&
              has_whole_chunks<T>(p.v, p.value_dim) && has_whole_chunks<T>(bp.dout, p.value_dim);
  d.compact = has_compact_keys<T>(d);
  const auto end = [&](const Rows& rows) {
    return d.heads_together() * rows.head + p.seqlen_q * rows.seq;
  };
  d.compact_queries = d.aligned && is_compact<T>(end(p.q)) && is_compact<T>(end(d.dout));
  return d;
}

// Launches kQueries(d), then kKeys(d).
template <typename T, int kBucket, typename Keys, auto kQueries, auto kKeys>
const char* launch_gradients(BlockSparseGradients d, cudaStream_t stream) {
  using Queries = QuerySideShape<T, kBucket>;
  const AttentionParams& p = d.attention;
  if (const char* error =
          launch<kQueries>(query_tiles(d), d.row_warps * kWarpSize,
                           Queries::template shared_bytes<TileKeys>(d.row_warps), stream, d))
    return error;
  d.row_warps = key_row_warps(d, Keys::kMaxRowWarps);
  d.tile_rows = Keys::kWarpRows * d.row_warps;
  d.tiles = static_cast<int>(max_tiles(p.cu_seqlens_k, p.batch, p.seqlen_k, d.tile_rows));
  return launch<kKeys>((p.cu_seqlens_k ? 1 : p.batch) * p.kv_heads * d.tiles,
                       d.row_warps * Keys::kColumnWarps * kWarpSize,
                       Keys::shared_bytes(d.row_warps), stream, d);
}

inline int64_t statistics_rows(const AttentionParams& p) {
  return (p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.seqlen_q;
}

// Row statistics (minus lse, minus delta) in the workspace.
inline BackwardArgs statistics_of(const BlockSparseBackwardParams& bp) {
  const AttentionParams& p = bp.forward.attention;
  BackwardArgs args{};
  args.p.forward = p;
  args.p.dout = bp.dout;
  args.p.dlse = bp.dlse;
  args.p.minus_lse = static_cast<float*>(bp.workspace);
  args.p.minus_delta = args.p.minus_lse + statistics_rows(p);
  return args;
}

// Computes the row statistics, which both kernels read.
template <typename T>
const char* launch_statistics(const BlockSparseBackwardParams& bp, cudaStream_t stream,
                              BlockSparseGradients& d) {
  const BackwardArgs args = statistics_of(bp);
  d = {};
  d.dout = bp.dout;
  d.dq = bp.dq;
  d.dk = bp.dk;
  d.dv = bp.dv;
  d.minus_lse = args.p.minus_lse;
  d.minus_delta = args.p.minus_delta;
  d.offsets = bp.offsets;
  d.listing = bp.rows;
  return cuda::launch_statistics<T>(args, false, stream);
}

// Parameters for row-wise kernels, which read only the extents of keys, not keys.
inline BlockSparseBackwardParams with_ends_of_keys(BlockSparseBackwardParams bp) {
  AttentionParams& p = bp.forward.attention;
  if (!p.cu_seqlens_k) p.cu_seqlens_k = p.cu_seqlens_q;
  return bp;
}

// Compiled once for each element type (kernel*.cu).
template <typename T>
const char* launch_block_sparse(const BlockSparseBackwardParams& bp, cudaStream_t stream);
template <typename T>
const char* launch_requests(const BlockSparseBackwardParams& bp, cudaStream_t stream);

}  // namespace tokenmill::cuda::block_sparse_attention
