// out[b, k] = x[b, indices[b, k]], rows of bytes. Free of torch.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

// Strides of x and out in bytes. Flat indices form one sequence, in which index i is token i %
// tokens of sequence i / tokens.
struct GatherTokensParams {
  int64_t batch, entries;  // shape of indices
  int64_t rows, tokens;    // indices are below rows: tokens, or tokens of all sequences
  int64_t row_bytes;
  const char* x;
  int64_t x_batch, x_token;
  const int32_t* indices;
  int64_t indices_batch;  // elements
  bool flat;
  char* out;  // [batch, entries, row_bytes]
  int64_t out_batch, out_row;
};

// null, or an error message
const char* launch_cuda(const GatherTokensParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(gather_tokens, GatherTokensParams)
