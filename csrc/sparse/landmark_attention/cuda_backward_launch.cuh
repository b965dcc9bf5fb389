// Launches the backward for one element type.
#pragma once
#include "attention/backward_statistics.cuh"
#include "sparse/landmark_attention/cuda_launch.cuh"
#include "sparse/landmark_attention/kernel_backward.cuh"

namespace tokenmill::cuda::landmark_attention {

template <typename T>
const char* launch_landmark(const LandmarkBackwardParams& g, cudaStream_t stream) {
  const AttentionParams& p = g.attention.forward;
  if (const char* error = launch_statistics<T>({.p = g.attention}, false, stream)) return error;
  return visit_bucket(p, [&]<int kBucket>() {
    using Shape = LandmarkGradientShape<T, kBucket, Side::queries>;
    using KeyShape = LandmarkGradientShape<T, kBucket, Side::keys>;
    const KeyTiles keys = KeyTiles::of(p.seqlen_k, g.block, Shape::kTileRows);
    const int64_t tiles = ceil_div(p.seqlen_q, int64_t{Shape::kTileRows});
    const bool aligned =
        has_aligned_rows<T>(p) && has_whole_chunks<T>(g.attention.dout, p.value_dim);
    const GradientLaunch launched{g.attention, keys, FastDivmod::of(keys.block),
                                  static_cast<int>(tiles), aligned};
    if (const char* error = launch<landmark_queries_kernel<T, kBucket>>(
            p.batch * p.heads * tiles, Shape::kThreads, Shape::kSharedBytes, stream, launched))
      return error;
    return launch<landmark_keys_kernel<T, kBucket>>(p.batch * p.kv_heads * keys.count(),
                                                    KeyShape::kThreads, KeyShape::kSharedBytes,
                                                    stream, launched);
  });
}

}  // namespace tokenmill::cuda::landmark_attention
