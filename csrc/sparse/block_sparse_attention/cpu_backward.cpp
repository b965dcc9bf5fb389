#include "sparse/cpu_backward.h"

#include "sparse/block_sparse_attention/cpu_blocks.h"

namespace tokenmill::TOKENMILL_ISA {

void block_sparse_attention_backward(const BlockSparseBackwardParams& g) {
  listed_backward<BlockWalk>(g);
}

}  // namespace tokenmill::TOKENMILL_ISA
