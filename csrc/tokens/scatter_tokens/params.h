// out = base with out[b, indices[b, k]] = y[b, k], rows of bytes. Free of torch.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

// Strides of y and base in bytes. With flat indices, y has one sequence, whose indices count the
// tokens of all sequences of out.
struct ScatterTokensParams {
  int64_t batch, tokens;       // shape of out
  int64_t sequences, entries;  // shape of y
  int64_t rows;                // indices are below `rows`
  int64_t row_bytes;
  const char* y;
  int64_t y_batch, y_row;
  const int32_t* indices;
  int64_t indices_batch;  // elements
  const char* base;       // null: zeros
  int64_t base_batch, base_token;
  int32_t* places;  // [batch, tokens]: row of y, within its sequence, that a token takes, or -1
  char* out;        // [batch, tokens, row_bytes]
};

// null, or an error message. Writes places.
const char* launch_cuda(const ScatterTokensParams&, void* stream);

}  // namespace tokenmill

// Reads places.
TOKENMILL_CPU_KERNEL(scatter_tokens, ScatterTokensParams)
