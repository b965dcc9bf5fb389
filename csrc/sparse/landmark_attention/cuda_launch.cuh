// Launches the forward for one element type.
#pragma once
#include "sparse/landmark_attention/kernel.cuh"
#include "sparse/listed_plan.cuh"

namespace tokenmill::cuda::landmark_attention {

template <typename T>
bool has_aligned_rows(const AttentionParams& p) {
  return has_whole_chunks<T>(p.q, p.head_dim) && has_whole_chunks<T>(p.k, p.head_dim) &&
         has_whole_chunks<T>(p.v, p.value_dim);
}

template <typename T>
const char* launch_landmark(const LandmarkParams& d, cudaStream_t stream) {
  const AttentionParams& p = d.attention;
  return visit_bucket(p, [&]<int kBucket>() {
    using Shape = LandmarkShape<T, kBucket>;
    const int64_t tiles = ceil_div(p.seqlen_q, int64_t{Shape::kRows});
    const LandmarkLaunch launched{d, KeyTiles::of(p.seqlen_k, d.block, Shape::kTileKeys),
                                  static_cast<int>(tiles), has_aligned_rows<T>(p)};
    return launch<landmark_forward_kernel<T, kBucket>>(p.batch * p.heads * tiles,
                                                       Shape::kWarps * kWarpSize,
                                                       Shape::kSharedBytes, stream, launched);
  });
}

}  // namespace tokenmill::cuda::landmark_attention
