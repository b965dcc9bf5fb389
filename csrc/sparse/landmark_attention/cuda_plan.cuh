// Launches of forward and backward.
#pragma once
#include "sparse/landmark_attention/params.h"
#include "sparse/listed_plan.cuh"

namespace tokenmill::cuda::landmark_attention {

template <typename T>
bool has_aligned_rows(const AttentionParams& p) {
  return has_whole_chunks<T>(p.q, p.head_dim) && has_whole_chunks<T>(p.k, p.head_dim) &&
         has_whole_chunks<T>(p.v, p.value_dim);
}

// Compiled once for each element type (kernel*.cu).
template <typename T>
const char* launch_landmark(const LandmarkParams& d, cudaStream_t stream);
template <typename T>
const char* launch_landmark(const LandmarkBackwardParams& g, cudaStream_t stream);

}  // namespace tokenmill::cuda::landmark_attention
