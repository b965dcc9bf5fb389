// Attention mass of list entries. Free of torch.
#pragma once
#include "sparse/block_sparse_attention/params.h"

namespace tokenmill {

// lse comes from the forward.
struct BlockSparseMass : BlockSparseParams {
  float* mass;        // [B, heads, rows, entries] of the lists; null: not requested
  int64_t mass_rows;  // rows per head: over all requests if packed
};

const char* launch_cuda(const BlockSparseMass&, void* stream);

}  // namespace tokenmill
