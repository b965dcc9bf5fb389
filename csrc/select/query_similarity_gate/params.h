#pragma once
#include "core/dtype.h"
#include "core/rows.h"
#include "cpu/isa.h"

namespace tokenmill {

// out[b]: true if the cosine of the sums of two lists of queries [B, S, H, D] reaches a threshold.
struct SimilarityGateParams {
  int64_t batch, heads, head_dim;
  int64_t lengths[2];
  DType dtype;
  Rows rows[2];
  float threshold;
  bool* out;
};

// null, or an error message
const char* launch_cuda(const SimilarityGateParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(query_similarity_gate, SimilarityGateParams)
