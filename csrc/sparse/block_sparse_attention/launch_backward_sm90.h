// Launch conditions of the sm_90a backward, and its launch.
#pragma once
#include "sparse/block_sparse_attention/kernel_queries.cuh"
#include "sparse/block_sparse_attention/launch_sm90.h"

namespace tokenmill::cuda::block_sparse_attention {

// Same rules as python/tokenmill/sparse/block_sparse_kernels.py. dO has the layout of `out`.
inline bool takes_backward_sm90(const BlockSparseBackwardParams& bp) {
  BlockSparseParams d = bp.forward;
  d.attention.out = bp.dout;
  return !(d.attention.softcap > 0) && takes_sm90(d);
}

// g: result of launch_statistics. Launches both kernels; dq, dk and dv are written completely.
template <typename T>
const char* launch_gradients_sm90(const BlockSparseBackwardParams& bp,
                                  const BlockSparseGradients& g, cudaStream_t stream);

}  // namespace tokenmill::cuda::block_sparse_attention
