// Launch of the backward of packed requests.
#include "sparse/block_sparse_attention/cuda_backward_plan.cuh"
#include "sparse/block_sparse_attention/kernel_requests_backward.cuh"

namespace tokenmill::cuda::block_sparse_attention {

template <typename T>
const char* launch_requests(const BlockSparseBackwardParams& bp, cudaStream_t stream) {
  const AttentionParams& p = bp.forward.attention;
  BlockSparseGradients d;
  if (const char* error = launch_statistics<T>(with_ends_of_keys(bp), stream, d)) return error;
  return visit_bucket(p, [&]<int kBucket>() {
    BlockSparseGradients plan = plan_query_side<T, kBucket>(bp, d);
    const int64_t block_q = int64_t{1} << plan.log2_block_q;
    plan.query_blocks = max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, block_q);
    return launch_gradients<T, kBucket, RequestKeySide<T, kBucket>,
                            block_sparse_requests_queries_kernel<T, kBucket>,
                            block_sparse_requests_keys_kernel<T, kBucket>>(plan, stream);
  });
}

template const char* launch_requests<TOKENMILL_ELEMENT>(const BlockSparseBackwardParams&,
                                                        cudaStream_t);

}  // namespace tokenmill::cuda::block_sparse_attention
