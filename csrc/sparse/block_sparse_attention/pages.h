// Keys in pages. Free of torch.
#pragma once
#include "sparse/block_sparse_attention/mass.h"

namespace tokenmill {

// Key x of a request is row x % 2^log2_size of a page. Pages are Rows::batch apart.
struct KeyPages {
  const int32_t* table;  // [B, pages of a request]
  int64_t stride;
  int32_t log2_size;

  TOKENMILL_HOST_DEVICE int64_t page(int64_t b, int64_t x) const {
    return table[b * stride + (x >> log2_size)];
  }
  TOKENMILL_HOST_DEVICE int64_t row(int64_t x) const { return x & ((int64_t{1} << log2_size) - 1); }
};

struct PagedBlockSparse : BlockSparseMass {  // mass: null if it is not asked for
  KeyPages pages;                            // whose pages of keys that requests have are there
};

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(block_sparse_attention_pages, PagedBlockSparse)
