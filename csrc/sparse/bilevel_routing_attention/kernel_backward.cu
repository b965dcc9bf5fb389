// Backward over the keys of listed regions.
#include "sparse/bilevel_routing_attention/cuda_plan.cuh"
#include "sparse/bilevel_routing_attention/kernel_queries.cuh"
#include "sparse/listed_backward.cuh"

namespace tokenmill::cuda::bilevel_routing_attention {

constexpr int kMapStatisticsThreads = 128, kMapStatisticsLanes = 8;  // per CTA, per row

// Partial dot product of two rows by one of kMapStatisticsLanes lanes.
template <int kCount, typename T>
__device__ float dot_of_lane(const T* a, const T* b, int lane, int64_t columns) {
  float sum = 0;
  for (int i = lane * kCount; i < columns; i += kMapStatisticsLanes * kCount) {
    float x[kCount], y[kCount];
    load_floats(x, a + i);
    load_floats(y, b + i);
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum = fmaf(x[j], y[j], sum);
  }
  return sum;
}

// minus_lse in log2 units, -inf for rows that saw no key so that P = 0, and minus_delta. d.aligned
// refers to out and dout.
template <typename T>
__global__ void __launch_bounds__(kMapStatisticsThreads)
    bilevel_statistics_kernel(const __grid_constant__ RegionGradients d) {
  const AttentionParams& p = d.attention;
  const int64_t rows = p.batch * p.heads * p.seqlen_q;
  const int64_t thread = int64_t{blockIdx.x} * kMapStatisticsThreads + threadIdx.x;
  const int64_t row = min(thread / kMapStatisticsLanes, rows - 1), head = row / p.seqlen_q;
  const int query = static_cast<int>(row % p.seqlen_q), width = d.query_map.grid.width;
  const int place = query / width << kPlaceBits | query % width;
  const T* out = row_at<const T>(d.out(), head / p.heads, place, head % p.heads);
  const T* dout = row_at<const T>(d.of_dout(), head / p.heads, place, head % p.heads);
  const int lane = threadIdx.x % kMapStatisticsLanes;
  float sum = d.aligned ? dot_of_lane<16 / sizeof(T)>(out, dout, lane, p.value_dim)
                        : dot_of_lane<1>(out, dout, lane, p.value_dim);
#pragma unroll
  for (int offset = kMapStatisticsLanes / 2; offset > 0; offset /= 2)
    sum += __shfl_xor_sync(kFullWarp, sum, offset);
  if (lane > 0 || thread / kMapStatisticsLanes >= rows) return;
  const float lse = p.lse[row];
  d.minus_lse[row] = lse == -infinity() ? lse : -lse * kLog2e;
  d.minus_delta[row] = (d.dlse ? d.dlse[row] : 0) - sum;
}

template <typename T, int kBucket>
__global__ void __launch_bounds__(QuerySideShape<T, kBucket>::kMaxThreads, 1)
    bilevel_queries_kernel(const __grid_constant__ RegionGradients d) {
  listed_query_gradients<T, kBucket, RegionGradientWalk>(d);
}

template <typename T, int kBucket>
using BilevelKeySide = KeySideShape<T, kBucket, RegionListing>;

template <typename T, int kBucket>
__global__ void __launch_bounds__(BilevelKeySide<T, kBucket>::kMaxThreads, 1)
    bilevel_keys_kernel(const __grid_constant__ RegionGradients d) {
  listed_key_gradients<T, kBucket, RegionGradientWalk>(d);
}

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

template const char* launch_bilevel<TOKENMILL_ELEMENT>(const RegionGradients&, cudaStream_t);

}  // namespace tokenmill::cuda::bilevel_routing_attention
