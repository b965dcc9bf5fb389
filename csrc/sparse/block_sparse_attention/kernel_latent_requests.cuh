// Maps packed queries to requests, once for all CTAs of the launch.
#pragma once
#include "cuda/warp.cuh"
#include "sparse/block_sparse_attention/latent.h"

namespace tokenmill::cuda::block_sparse_attention {

constexpr int kFindThreads = 128;

static __global__ void __launch_bounds__(kFindThreads)
    block_sparse_find_requests_kernel(const __grid_constant__ LatentBlockSparse d, int32_t* to) {
  const int64_t n = int64_t{blockIdx.x} * kFindThreads + threadIdx.x;
  if (n < d.attention.batch) to[n] = d.find_request(n);
}

}  // namespace tokenmill::cuda::block_sparse_attention
