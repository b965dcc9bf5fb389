// Which calls the backward of compute capability 9.0a takes, and its launch.
#pragma once
#include "sparse/block_sparse_attention/kernel_queries.cuh"
#include "sparse/block_sparse_attention/launch_sm90.h"

namespace tokenmill::cuda::block_sparse_attention {

// The rules of python/tokenmill/sparse/block_sparse_kernels.py. dO lies like `out`.
inline bool takes_backward_sm90(const BlockSparseBackwardParams& bp) {
  BlockSparseParams d = bp.forward;
  d.attention.out = bp.dout;
  return !(d.attention.softcap > 0) && takes_sm90(d);
}

// g: what launch_statistics left. Both kernels; dq, dk and dv are written whole.
template <typename T>
const char* launch_gradients_sm90(const BlockSparseBackwardParams& bp,
                                  const BlockSparseGradients& g, cudaStream_t stream);

}  // namespace tokenmill::cuda::block_sparse_attention
