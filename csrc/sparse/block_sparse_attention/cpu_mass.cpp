#include "sparse/block_sparse_attention/cpu_mass.h"

namespace tokenmill::TOKENMILL_ISA {

void block_sparse_attention_mass(const BlockSparseCalls& calls) { listed_mass<BlockWalk>(calls); }

}  // namespace tokenmill::TOKENMILL_ISA
