#include "sparse/block_sparse_attention/latent.h"
#include "sparse/sparse_decode_attention/cpu_listed.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

template <class Op, DType kType>
using LatentKeys = ListedKeys<Op, kType, LatentBlockSparse>;

}  // namespace

void block_sparse_attention_latent(const LatentBlockSparse& d) { decode_latent<LatentKeys>(d); }

}  // namespace tokenmill::TOKENMILL_ISA
