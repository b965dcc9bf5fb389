#include "sparse/block_sparse_attention/cpu_blocks.h"
#include "sparse/cpu_forward.h"

namespace tokenmill::TOKENMILL_ISA {

void block_sparse_attention_forward(const BlockSparseCalls& calls) {
  listed_forward(walks_of<BlockWalk>(calls).data(), calls.count);
}

}  // namespace tokenmill::TOKENMILL_ISA
