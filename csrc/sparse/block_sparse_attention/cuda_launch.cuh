// Launches the forward for one element type.
#pragma once
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernel.cuh"

namespace tokenmill::cuda::block_sparse_attention {

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

}  // namespace tokenmill::cuda::block_sparse_attention
