#include "sparse/block_sparse_attention/cpu_blocks.h"
#include "sparse/cpu_forward.h"

namespace tokenmill::TOKENMILL_ISA {

void block_sparse_attention_forward(const BlockSparseParams& d) { listed_forward<BlockWalk>(d); }

}  // namespace tokenmill::TOKENMILL_ISA
