// Lists of key blocks, one per query block of a head. Free of torch.
#pragma once
#include "core/dtype.h"

namespace tokenmill {

// Lists are ascending sets. Their contents are not trusted: an id counts if it is a block index and
// greater than all previous ids (`ListWalk`).
struct BlockList {
  const int32_t *indices, *counts;  // [B, heads, rows, entries] and [B, heads, rows], strided
  int64_t indices_batch, indices_head, indices_row;
  int64_t counts_batch, counts_head, counts_row;
  int64_t heads, rows, entries;  // heads: 1, KV heads or query heads

  TOKENMILL_HOST_DEVICE const int32_t* at(int64_t b, int64_t head, int64_t row) const {
    return indices + b * indices_batch + head * indices_head + row * indices_row;
  }
  TOKENMILL_HOST_DEVICE int64_t count(int64_t b, int64_t head, int64_t row) const {
    const int64_t n = counts[b * counts_batch + head * counts_head + row * counts_row];
    return n < 0 ? 0 : n > entries ? entries : n;
  }
};

// Decides which ids of a list count; ids are visited in order.
struct ListWalk {
  int64_t blocks;
  int64_t largest = -1;  // maximum id so far

  TOKENMILL_HOST_DEVICE bool counts(int32_t id) {
    if (id <= largest) return false;
    largest = id;
    return id < blocks;
  }
};

}  // namespace tokenmill
