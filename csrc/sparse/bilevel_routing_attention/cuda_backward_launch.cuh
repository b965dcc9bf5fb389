// Launches the backward kernels for one element type.
#pragma once
#include "sparse/bilevel_routing_attention/cuda_plan.cuh"
#include "sparse/bilevel_routing_attention/kernel_backward.cuh"

namespace tokenmill::cuda::bilevel_routing_attention {

template <typename T, int kBucket>
const char* launch_gradients(RegionGradients d, cudaStream_t stream) {
  using Queries = QuerySideShape<T, kBucket>;
  using Keys = BilevelKeySide<T, kBucket>;
  const AttentionParams& p = d.attention;
  const bool aligned_out = has_whole_chunks<T>(d.dout, p.value_dim, d.dout_line);
  d.aligned = aligned_out && has_whole_chunks<T>(p.out, p.value_dim, d.out_line);
  const int64_t lanes = p.batch * p.heads * p.seqlen_q * kMapStatisticsLanes;
  if (const char* error = launch<bilevel_statistics_kernel<T>>(
          ceil_div(lanes, kMapStatisticsThreads), kMapStatisticsThreads, 0, stream, d))
    return error;
  d.aligned = aligned_out && has_whole_chunks<T>(p.q, p.head_dim, d.q_line) &&
              has_whole_chunks<T>(p.k, p.head_dim, d.k_line) &&
              has_whole_chunks<T>(p.v, p.value_dim, d.v_line);
  d.compact = has_compact_keys<T>(d);
  const auto end = [&](const Rows& rows, int64_t line) {
    return d.together.value * rows.head + d.queries.height * line + d.queries.width * rows.seq;
  };
  d.compact_queries =
      d.aligned && is_compact<T>(end(p.q, d.q_line)) && is_compact<T>(end(d.dout, d.dout_line));
  cut_rows(d, query_rows(d), Queries::kWarpRows, 1, Queries::kMaxRowWarps);
  if (const char* error = launch<bilevel_queries_kernel<T, kBucket>>(
          query_tiles(d), d.row_warps * kWarpSize,
          Queries::template shared_bytes<RegionKeys>(d.row_warps), stream, d))
    return error;
  cut_rows(d, d.key_map.slot, Keys::kWarpRows, 1, Keys::kMaxRowWarps);
  return launch<bilevel_keys_kernel<T, kBucket>>(p.batch * p.kv_heads * d.key_map.regions * d.tiles,
                                                 d.row_warps * Keys::kColumnWarps * kWarpSize,
                                                 Keys::shared_bytes(d.row_warps), stream, d);
}

template <typename T>
const char* launch_bilevel(const RegionGradients& d, cudaStream_t stream) {
  return visit_bucket(d.attention,
                      [&]<int kBucket>() { return launch_gradients<T, kBucket>(d, stream); });
}

}  // namespace tokenmill::cuda::bilevel_routing_attention
