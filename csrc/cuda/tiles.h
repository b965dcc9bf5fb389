// Number of tiles of a launch. Host code without CUDA headers.
#pragma once
#include "core/dtype.h"

namespace tokenmill::cuda {

// Upper bound, from shapes only, on the number of tiles of `rows` rows in all sequences and in the
// rows without one. Packed: sequences with fewer than `fewest` rows have none.
inline int64_t max_tiles(const int32_t* cu_seqlens, int64_t batch, int64_t tokens, int64_t rows,
                         int64_t fewest = 0) {
  if (!cu_seqlens) return ceil_div(tokens, rows);
  return tokens / rows + (fewest > 1 && tokens / fewest < batch ? tokens / fewest : batch) + 1;
}

}  // namespace tokenmill::cuda
