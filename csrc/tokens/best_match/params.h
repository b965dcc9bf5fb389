#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

// a [B, rows, C] and b [B, partners, C] with a contiguous last dimension; strides in elements. A
// product is (dot product * factor of the row of b) * factor of the row of a, where a factor is
// factor_of the sum of squares with normalize, 1 without.
struct MatchParams {
  int64_t batch, rows, partners, channels;
  DType dtype;
  bool normalize;
  const void* a;
  int64_t a_batch, a_row;
  const void* b;
  int64_t b_batch, b_row;
  int32_t* index;   // [B, rows]
  float* score;     // [B, rows]
  void* workspace;  // CUDA only
};

// A row whose norm is not finite has factor NaN, so that no product with it is selected. Squares
// that sum to less than the smallest normal float, which are denormals on some hardware, count as
// 0.
constexpr float kMinSquares = 1.17549435e-38f;
constexpr float kMaxSquares = 3.402823466e38f;

// CUDA workspace in bytes.
int64_t workspace_bytes(const MatchParams&);

// null, or an error message
const char* launch_cuda(const MatchParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(best_match, MatchParams)
