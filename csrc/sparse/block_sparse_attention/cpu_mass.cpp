#include "sparse/block_sparse_attention/cpu_mass.h"

namespace tokenmill::TOKENMILL_ISA {

void block_sparse_attention_mass(const BlockSparseMass& d) { listed_mass<BlockWalk>(d); }

}  // namespace tokenmill::TOKENMILL_ISA
