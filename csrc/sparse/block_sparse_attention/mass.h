// What the entries of lists got of the weights. Free of torch.
#pragma once
#include "sparse/block_sparse_attention/params.h"

namespace tokenmill {

// lse as the forward left it.
struct BlockSparseMass : BlockSparseParams {
  float* mass;        // [B, heads, rows, entries] of the lists, null: not asked for
  int64_t mass_rows;  // of a head: of all requests where they are packed
};

const char* launch_cuda(const BlockSparseMass&, void* stream);

}  // namespace tokenmill
