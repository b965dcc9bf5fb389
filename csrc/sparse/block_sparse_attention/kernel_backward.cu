// Backward over sink keys, listed blocks and recent keys.
#include "sparse/block_sparse_attention/cuda_backward_plan.cuh"
#include "sparse/block_sparse_attention/kernel_queries.cuh"
#include "sparse/listed_backward.cuh"

namespace tokenmill::cuda::block_sparse_attention {

template <typename T, int kBucket>
__global__ void __launch_bounds__(QuerySideShape<T, kBucket>::kMaxThreads, 1)
    block_sparse_queries_kernel(const __grid_constant__ BlockSparseGradients d) {
  listed_query_gradients<T, kBucket, BlockGradientWalk>(d);
}

template <typename T, int kBucket>
using BlockSparseKeySide = KeySideShape<T, kBucket, BlockListing<T, kBucket, BatchQueries>>;

template <typename T, int kBucket>
__global__ void __launch_bounds__(BlockSparseKeySide<T, kBucket>::kMaxThreads, 1)
    block_sparse_keys_kernel(const __grid_constant__ BlockSparseGradients d) {
  listed_key_gradients<T, kBucket, BlockGradientWalk>(d);
}

template <typename T>
const char* launch_block_sparse(const BlockSparseBackwardParams& bp, cudaStream_t stream) {
  BlockSparseGradients d;
  if (const char* error = launch_statistics<T>(bp, stream, d)) return error;
  return visit_bucket(bp.forward.attention, [&]<int kBucket>() {
    return launch_gradients<T, kBucket, BlockSparseKeySide<T, kBucket>,
                            block_sparse_queries_kernel<T, kBucket>,
                            block_sparse_keys_kernel<T, kBucket>>(
        plan_query_side<T, kBucket>(bp, d), stream);
  });
}

template const char* launch_block_sparse<TOKENMILL_ELEMENT>(const BlockSparseBackwardParams&,
                                                            cudaStream_t);

}  // namespace tokenmill::cuda::block_sparse_attention
