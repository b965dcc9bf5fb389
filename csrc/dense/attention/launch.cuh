// Launches of kernels that are compiled once for each element type, and mode (kernel*.cu).
#pragma once
#include <cuda_runtime.h>

#include "attention/head_dim.cuh"
#include "attention/mask_bounds.h"
#include "attention/rules_sm90.h"
#include "attention/score_map.cuh"
#include "cuda/sequences.cuh"

namespace tokenmill::cuda {

// --- sm_80

template <typename T>
const char* launch_forward(const AttentionParams& p, const MaskBounds& bounds, cudaStream_t stream);

struct BackwardArgs;
enum class Mode;

// Rarer modes have fewer instances, and not the largest ones.
constexpr int64_t kLargestElementwise = 128;

// dq, dk and dv. Requires the row statistics. float32 has the general mode only.
template <typename T, Mode kMode>
const char* launch_pairs(const BackwardArgs& args, cudaStream_t stream);

// dbias of a broadcast bias.
template <typename T>
const char* launch_bias(const BackwardArgs& args, cudaStream_t stream);

// --- sm_90a

// Calls visit(Index<kDim>{}) with the smallest compiled dimension >= head_dim.
template <typename Visit, int... kDims>
auto visit_sm90_dim(int64_t head_dim, const Visit& visit, HeadDimList<kDims...>) {
  return visit_least_dim<kDims...>(head_dim, visit);
}
template <typename Visit>
auto visit_sm90_dim(int64_t head_dim, const Visit& visit) {
  return visit_sm90_dim(head_dim, visit, Sm90HeadDims{});
}

// The call is described in rules_sm90.h.
template <typename T, Weights kWeights>
const char* launch_forward_sm90(const AttentionParams& p, const KvCache& cache,
                                cudaStream_t stream);

// A backward call that the sm_90a kernel takes.
struct Sm90Backward {
  AttentionBackwardParams params;
  float* dq_sums;  // sm90_workspace_bytes(params.forward) bytes
};

// Returns null, kNotMapped, or an error message.
template <typename T, Weights kWeights>
const char* launch_backward_sm90(const Sm90Backward& call, cudaStream_t stream);

}  // namespace tokenmill::cuda
