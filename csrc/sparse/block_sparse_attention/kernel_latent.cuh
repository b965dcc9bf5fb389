// Latent heads: each query is a request of sparse_decode_attention. A block has up to 16 heads that
// share a list, and as many blocks as heads need follow each other, so that they find keys in L2.
#pragma once
#include "sparse/block_sparse_attention/latent.h"
#include "sparse/sparse_decode_attention/kernel.cuh"

namespace tokenmill::cuda::block_sparse_attention {

struct LatentLaunch : sparse_decode_attention::ListedLaunch<LatentBlockSparse> {};

template <typename T>
using LatentKeys = sparse_decode_attention::ListedKeys<T, kLatentBucket, T, LatentLaunch>;

template <typename T>
__global__ void __launch_bounds__(kDecodeThreads)
    block_sparse_latent_kernel(const __grid_constant__ LatentLaunch d,
                               const __grid_constant__ DecodePlan plan) {
  sparse_decode_attention::run_listed<LatentKeys<T>>(d, plan);
}

}  // namespace tokenmill::cuda::block_sparse_attention
