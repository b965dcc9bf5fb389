// Launch of the forward over packed requests and paged keys.
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernel_requests.cuh"

namespace tokenmill::cuda::block_sparse_attention {

template <typename T, int kBucket>
const char* launch_requests_of(const BlockSparseParams& d, cudaStream_t stream) {
  using Shape = ListedShape<T, kBucket>;
  using Memory = ForwardMemory<T, kBucket, RequestKeys>;
  RequestLaunch plan{plan_forward<T, kBucket>(d)};
  const AttentionParams& p = d.attention;
  plan.keys = KeyRows::of<T>(p.k, d.pages);
  plan.values = KeyRows::of<T>(p.v, d.pages);
  const int64_t block_q = int64_t{1} << d.log2_block_q;
  plan.query_blocks = max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, block_q);
  return launch<block_sparse_requests_kernel<T, kBucket>>(
      query_tiles(plan), plan.row_warps * Shape::kColumnWarps * kWarpSize,
      Memory::bytes(plan.row_warps), stream, plan);
}

template <typename T>
const char* launch_requests(const BlockSparseParams& d, cudaStream_t stream) {
  return visit_bucket(d.attention,
                      [&]<int kBucket>() { return launch_requests_of<T, kBucket>(d, stream); });
}

template const char* launch_requests<TOKENMILL_ELEMENT>(const BlockSparseParams&, cudaStream_t);

}  // namespace tokenmill::cuda::block_sparse_attention
