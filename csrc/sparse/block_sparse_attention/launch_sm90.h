// Work units of the sm_90a forward, and its launch.
#pragma once
#include <cuda_runtime.h>

#include "cuda/sequences.cuh"
#include "sparse/block_sparse_attention/rules_sm90.h"

namespace tokenmill::cuda::block_sparse_attention {

// Number of 64-row units in the rows of a query block, see Sm90Launch.
inline int64_t sm90_units(const BlockSparseParams& d) {
  const int64_t block_q = int64_t{1} << d.log2_block_q, queries = d.attention.seqlen_q;
  return ceil_div(block_q < queries ? block_q : queries, 64) * d.heads_together();
}

template <typename T>
const char* launch_block_sparse_sm90(const BlockSparseParams& d, cudaStream_t stream);

}  // namespace tokenmill::cuda::block_sparse_attention
