// Launch of the sm_90a backward.
#pragma once
#include "sparse/block_sparse_attention/kernel_queries.cuh"
#include "sparse/block_sparse_attention/launch_sm90.h"

namespace tokenmill::cuda::block_sparse_attention {

// g: result of launch_statistics. Launches both kernels; dq, dk and dv are written completely.
template <typename T>
const char* launch_gradients_sm90(const BlockSparseBackwardParams& bp,
                                  const BlockSparseGradients& g, cudaStream_t stream);

}  // namespace tokenmill::cuda::block_sparse_attention
