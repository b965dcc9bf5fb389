// Forward over sink keys, listed blocks and recent keys.
#pragma once
#include "sparse/block_sparse_attention/kernel_keys.cuh"
#include "sparse/listed_forward.cuh"

namespace tokenmill::cuda::block_sparse_attention {

template <typename T, int kBucket>
__global__ void __launch_bounds__(ListedShape<T, kBucket>::kMaxThreads,
                                  ListedShape<T, kBucket>::kMinBlocks)
    block_sparse_forward_kernel(const __grid_constant__ BlockSparseLaunch d) {
  listed_forward<T, kBucket, BlockWalk>(d);
}

}  // namespace tokenmill::cuda::block_sparse_attention
