#include "sparse/block_sparse_attention/cpu_mass.h"
#include "sparse/block_sparse_attention/pages.h"
#include "sparse/cpu_forward.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

struct PagedWalk : BlockWalk {
  using Params = PagedBlockSparse;
  using MassParams = PagedBlockSparse;

  const KeyPages& pages;

  explicit PagedWalk(const PagedBlockSparse& d) : BlockWalk(d), pages(d.pages) {}

  char* key_row(const Rows& rows, int64_t b, int64_t key, int64_t h) const {
    return row_of(rows, d.attention.dtype, pages.page(b, key), 0, pages.row(key), h);
  }
};

}  // namespace

void block_sparse_attention_pages(const PagedBlockSparse& d) {
  listed_forward<PagedWalk>(d);
  if (d.mass) listed_mass<PagedWalk>(d);
}

}  // namespace tokenmill::TOKENMILL_ISA
