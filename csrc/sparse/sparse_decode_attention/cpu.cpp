#include "sparse/sparse_decode_attention/cpu_listed.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

template <class Op, DType kType>
using SparseKeys = ListedKeys<Op, kType, SparseDecodeParams>;

}  // namespace

void sparse_decode_attention(const SparseDecodeParams& d) { decode_elements<SparseKeys>(d); }

}  // namespace tokenmill::TOKENMILL_ISA
