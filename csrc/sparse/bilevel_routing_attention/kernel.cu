// Forward over the keys of listed regions.
#include "sparse/bilevel_routing_attention/cuda_plan.cuh"
#include "sparse/bilevel_routing_attention/kernel_keys.cuh"
#include "sparse/listed_forward.cuh"

namespace tokenmill::cuda::bilevel_routing_attention {

template <typename T, int kBucket>
__global__ void __launch_bounds__(ListedShape<T, kBucket>::kMaxThreads,
                                  ListedShape<T, kBucket>::kMinBlocks)
    bilevel_forward_kernel(const __grid_constant__ RegionLaunch d) {
  listed_forward<T, kBucket, RegionWalk>(d);
}

template <typename T, int kBucket>
const char* launch_forward(const RegionLaunch& planned, cudaStream_t stream) {
  using Shape = ListedShape<T, kBucket>;
  using Memory = ForwardMemory<T, kBucket, RegionKeys>;
  RegionLaunch d = planned;
  const AttentionParams& p = d.attention;
  cut_rows(d, query_rows(d), Shape::kWarpRows, Shape::kMinRowWarps, Shape::kMaxRowWarps);
  d.aligned = has_whole_chunks<T>(p.q, p.head_dim, d.q_line) &&
              has_whole_chunks<T>(p.k, p.head_dim, d.k_line) &&
              has_whole_chunks<T>(p.v, p.value_dim, d.v_line);
  d.compact = has_compact_keys<T>(d);
  d.aligned_out = has_whole_chunks<T>(p.out, p.value_dim, d.out_line);
  return launch<bilevel_forward_kernel<T, kBucket>>(query_tiles(d),
                                                    d.row_warps * Shape::kColumnWarps * kWarpSize,
                                                    Memory::bytes(d.row_warps), stream, d);
}

template <typename T>
const char* launch_bilevel(const RegionLaunch& d, cudaStream_t stream) {
  return visit_bucket(d.attention,
                      [&]<int kBucket>() { return launch_forward<T, kBucket>(d, stream); });
}

template const char* launch_bilevel<TOKENMILL_ELEMENT>(const RegionLaunch&, cudaStream_t);

}  // namespace tokenmill::cuda::bilevel_routing_attention
