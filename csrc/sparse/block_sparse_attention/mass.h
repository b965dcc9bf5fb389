// What the entries of lists got of the weights. Free of torch.
#pragma once
#include "sparse/block_sparse_attention/params.h"

namespace tokenmill {

struct BlockSparseMass : BlockSparseParams {  // lse as the forward left it
  float* mass;                                // [B, heads, rows, entries] of the lists
};

const char* launch_cuda(const BlockSparseMass&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(block_sparse_attention_mass, BlockSparseMass)
