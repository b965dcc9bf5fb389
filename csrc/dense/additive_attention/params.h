// Scores u_ij = v . tanh(q_i + k_j) of additive attention, and their gradients. Free of torch.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

// q [B, T, A], k [B, N, A], v [A] and the mask with a contiguous last dimension; strides in
// elements.
struct AdditiveParams {
  int64_t batch, rows, keys, width;  // B, T, N, A
  DType dtype;
  const void* q;
  int64_t q_batch, q_row;
  const void* k;
  int64_t k_batch, k_row;
  const void* v;
  const uint8_t* mask;  // [B, T, N] or, with mask_row 0, [B, N]; null: all pairs are visible
  int64_t mask_batch, mask_row;
  float* scores;  // [B, T, N] contiguous; -inf for masked pairs
};

// With e = tanh(q_i + k_j) and d = g_ij v (1 - e^2): dq_i = sum_j d, dk_j = sum_i d and dv = sum_ij
// g_ij e. A pair that is masked, or whose g is 0, adds nothing whatever e is.
struct AdditiveBackwardParams {
  AdditiveParams forward;  // scores are unused
  const float* dscores;    // g [B, T, N] with a contiguous last dimension
  int64_t dscores_batch, dscores_row;
  void *dq, *dk, *dv;  // [B, T, A], [B, N, A] and [A] contiguous
  void* workspace;     // CUDA only
};

// Returns null or an error message.
const char* launch_cuda(const AdditiveParams&, void* stream);
const char* launch_cuda(const AdditiveBackwardParams&, void* stream);
int64_t workspace_bytes(const AdditiveBackwardParams&);  // CUDA only

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(additive_scores, AdditiveParams)
TOKENMILL_CPU_KERNEL(additive_scores_backward, AdditiveBackwardParams)
