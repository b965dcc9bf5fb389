// Query blocks that list each key block. Free of torch.
#pragma once
#include "cpu/isa.h"
#include "sparse/block_list.h"

namespace tokenmill {

struct TransposeBlockListParams {
  BlockList list;
  int64_t batch, blocks;  // key blocks
  int32_t* offsets;       // [B, heads, blocks + 1]
  int32_t* rows;          // [B, heads, list.rows * list.entries], -1 past the last
  void* workspace;        // CUDA
};

// null, or an error message
const char* launch_cuda(const TransposeBlockListParams&, void* stream);
int64_t workspace_bytes(const TransposeBlockListParams&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(transpose_block_list, TransposeBlockListParams)
