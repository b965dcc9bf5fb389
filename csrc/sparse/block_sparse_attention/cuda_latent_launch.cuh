// Launches the forward of latent heads for one element type.
#pragma once
#include "sparse/block_sparse_attention/kernel_latent.cuh"
#include "sparse/sparse_decode_attention/cuda_launch.cuh"

namespace tokenmill::cuda::block_sparse_attention {

template <typename T>
DecodeLaunch plan_latent(const LatentBlockSparse& d) {
  return sparse_decode_attention::plan_sparse<LatentKeys<T>>(d);
}

template <typename T>
const char* launch_latent(const LatentLaunch& d, void* workspace, cudaStream_t stream) {
  return launch_planned<block_sparse_latent_kernel<T>>(d, plan_latent<T>(d), workspace, stream);
}

}  // namespace tokenmill::cuda::block_sparse_attention
