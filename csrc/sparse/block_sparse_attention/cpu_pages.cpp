#include "sparse/block_sparse_attention/cpu_mass.h"
#include "sparse/cpu_forward.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

struct PagedWalk : BlockWalk {
  using BlockWalk::BlockWalk;

  char* key_row(const Rows& rows, int64_t b, int64_t key, int64_t h) const {
    return row_of(rows, d.attention.dtype, d.pages.page(b, key), 0, d.pages.row(key), h);
  }
};

}  // namespace

void block_sparse_attention_pages(const BlockSparseCalls& calls) {
  listed_forward(walks_of<PagedWalk>(calls).data(), calls.count);
}
void block_sparse_attention_pages_mass(const BlockSparseCalls& calls) {
  listed_mass<PagedWalk>(calls);
}

}  // namespace tokenmill::TOKENMILL_ISA
