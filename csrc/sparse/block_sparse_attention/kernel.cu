// Forward over sink keys, listed blocks and recent keys.
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernel_keys.cuh"
#include "sparse/listed_forward.cuh"

namespace tokenmill::cuda::block_sparse_attention {

template <typename T, int kBucket>
__global__ void __launch_bounds__(ListedShape<T, kBucket>::kMaxThreads,
                                  ListedShape<T, kBucket>::kMinBlocks)
    block_sparse_forward_kernel(const __grid_constant__ BlockSparseLaunch d) {
  listed_forward<T, kBucket, BlockWalk>(d);
}

template <typename T, int kBucket>
const char* launch_forward(const BlockSparseParams& d, cudaStream_t stream) {
  using Shape = ListedShape<T, kBucket>;
  using Memory = ForwardMemory<T, kBucket, TileKeys>;
  const BlockSparseLaunch plan = plan_forward<T, kBucket>(d);
  return launch<block_sparse_forward_kernel<T, kBucket>>(
      query_tiles(plan), plan.row_warps * Shape::kColumnWarps * kWarpSize,
      Memory::bytes(plan.row_warps), stream, plan);
}

template <typename T>
const char* launch_block_sparse(const BlockSparseParams& d, cudaStream_t stream) {
  return visit_bucket(d.attention,
                      [&]<int kBucket>() { return launch_forward<T, kBucket>(d, stream); });
}

template const char* launch_block_sparse<TOKENMILL_ELEMENT>(const BlockSparseParams&, cudaStream_t);

}  // namespace tokenmill::cuda::block_sparse_attention
