#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

// a [B, rows, C] and b [B, partners, C] with a contiguous last dimension; strides in elements.
// A product is (dot product * factor of the row of b) * factor of the row of a, where a factor is
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
  void* workspace;  // of the CUDA kernels
};

// Of a row whose norm is not finite: NaN, which no product survives. Squares that sum to less than
// the smallest normal float, denormals for some of the hardware, count as 0.
constexpr float kLeastSquares = 1.17549435e-38f;
constexpr float kMostSquares = 3.402823466e38f;

// What the CUDA kernels need beside the outputs.
int64_t workspace_bytes(const MatchParams&);

// null, or what went wrong
const char* launch_cuda(const MatchParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(best_match, MatchParams)
