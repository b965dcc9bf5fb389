// Blocks of a sequence: chunks, or parts of chunks longer than kBlock tokens.
//
// A block begins with the memory M and the momentum S, and its chunk with the memory G. With
// U = K G - V, the gradient of token j is k_j^T u_j, and after token t of the block
//
//   memory   = W[t, 0] M + W[t, 1] S - sum_(j <= t) W[t, 2 + j] k_j^T u_j
//   momentum =             E[t, 1] S - sum_(j <= t) E[t, 2 + j] k_j^T u_j
//
// Rows of W and E obey the same recurrences as memory and momentum; there are no divisions.
#pragma once
#include "linear/titans_memory/params.h"

namespace tokenmill {

struct TitansBlock {
  int64_t first, tokens;
  int64_t number_of_start;  // index of the first block of its chunk
  bool starts;              // the block starts a chunk
};

// Block `number` of a sequence of `length` tokens.
TOKENMILL_HOST_DEVICE inline TitansBlock titans_block(int64_t number, int64_t length,
                                                      int64_t chunk_size, int64_t block) {
  const int64_t parts = ceil_div(chunk_size, block);
  const int64_t chunk = number / parts, part = number % parts;
  const int64_t first = chunk * chunk_size + part * block;
  int64_t tokens = chunk_size - part * block;
  if (tokens > block) tokens = block;
  if (tokens > length - first) tokens = length - first;
  return {first, tokens, chunk * parts, part == 0};
}

TOKENMILL_HOST_DEVICE inline int64_t titans_blocks(int64_t length, int64_t chunk_size,
                                                   int64_t block) {
  return length / chunk_size * ceil_div(chunk_size, block) + ceil_div(length % chunk_size, block);
}

}  // namespace tokenmill
