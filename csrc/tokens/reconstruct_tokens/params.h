// Tokens as weighted sums of the values of their nearest centroids. Free of torch.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

// features [B, N, C], centroids [B, M, C] and values [B, M, Cv] with a contiguous last dimension;
// strides in elements.
struct ReconstructParams {
  int64_t batch, tokens, clusters, channels, value_channels, k;
  DType dtype;
  bool unit_norm;  // weights have Euclidean norm 1 instead of sum 1
  float tau;
  const void* features;
  int64_t features_batch, features_row;
  const void* centroids;
  int64_t centroids_batch, centroids_row;
  const void* values;
  int64_t values_batch, values_row;
  void* out;        // [B, N, Cv]
  int32_t* index;   // [B, N, k]
  float* weight;    // [B, N, k]
  void* workspace;  // CUDA only
};

// dvalues_m = sum of weight dout_n over the tokens n, in order, whose list contains m.
struct ReconstructBackwardParams {
  int64_t batch, tokens, clusters, value_channels, k;
  DType dtype;
  const void* dout;  // [B, N, Cv]
  int64_t dout_batch, dout_row;
  const int32_t* index;    // [B, N, k] contiguous, from the forward
  const float* weight;     // [B, N, k] contiguous
  const int32_t* offsets;  // [B, M + 1], offsets of the tokens of a centroid in ...
  const int32_t* listed;   // [B, N k]
  void* dvalues;           // [B, M, Cv] contiguous

  // Weight of centroid m in a token's list; 0 if an untrusted index does not contain it.
  TOKENMILL_HOST_DEVICE float weight_of(int64_t b, int64_t token, int64_t m) const {
    const int64_t row = (b * tokens + token) * k;
    for (int64_t j = 0; j < k; ++j)
      if (index[row + j] == m) return weight[row + j];
    return 0;
  }
};

// null, or an error message
const char* launch_cuda(const ReconstructParams&, void* stream);
const char* launch_cuda(const ReconstructBackwardParams&, void* stream);
int64_t workspace_bytes(const ReconstructParams&);  // CUDA

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(reconstruct_tokens, ReconstructParams)
TOKENMILL_CPU_KERNEL(reconstruct_tokens_backward, ReconstructBackwardParams)
