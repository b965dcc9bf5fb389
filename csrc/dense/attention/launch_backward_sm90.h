// Workspace and launch of the sm_90a backward.
#pragma once
#include <cuda_runtime.h>

#include "dense/attention/launch_sm90.h"

namespace tokenmill {

// A backward call that the sm_90a kernel takes.
struct Sm90Backward {
  AttentionBackwardParams params;
  float* dq_sums;  // sm90_workspace_bytes(params.forward) bytes
};

}  // namespace tokenmill

namespace tokenmill::cuda {

template <typename T, Weights kWeights>
const char* launch_backward_sm90(const Sm90Backward& call, cudaStream_t stream);

// Returns null, kNotMapped, or an error message.
template <typename T>
const char* launch_backward_sm90(const Sm90Backward& call, cudaStream_t stream) {
  if (call.params.forward.map == ScoreMap::softmax)
    return launch_backward_sm90<T, Weights::softmax>(call, stream);
  return launch_backward_sm90<T, Weights::sigmoid>(call, stream);
}

}  // namespace tokenmill::cuda
