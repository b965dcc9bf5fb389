// Calls with separate kernels: packed requests, and paged keys.
#pragma once
#include <cuda_runtime_api.h>

#include "sparse/block_sparse_attention/params.h"

namespace tokenmill::cuda::block_sparse_attention {

inline bool has_requests(const BlockSparseParams& d) {
  return d.attention.cu_seqlens_q || d.pages.table;
}

const char* launch_forward_of_requests(const BlockSparseParams&, cudaStream_t);

}  // namespace tokenmill::cuda::block_sparse_attention
