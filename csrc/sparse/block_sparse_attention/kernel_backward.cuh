// Backward over sink keys, listed blocks and recent keys.
#pragma once
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

}  // namespace tokenmill::cuda::block_sparse_attention
