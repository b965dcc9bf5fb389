// Launches the forward of latent heads for one element type.
#pragma once
#include "sparse/block_sparse_attention/kernel_latent.cuh"
#include "sparse/sparse_decode_attention/cuda_launch.cuh"

namespace tokenmill::cuda::block_sparse_attention {

template <typename T>
const char* launch_latent(const LatentLaunch& d, void* workspace, cudaStream_t stream) {
  using sparse_decode_attention::launch_listed;
  return launch_listed<block_sparse_latent_kernel<T>, LatentKeys<T>>(d, workspace, stream);
}

}  // namespace tokenmill::cuda::block_sparse_attention
