// Launch of the forward.
#include "sparse/landmark_attention/cuda_plan.cuh"
#include "sparse/landmark_attention/kernel.cuh"

namespace tokenmill::cuda::landmark_attention {

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

template const char* launch_landmark<TOKENMILL_ELEMENT>(const LandmarkParams&, cudaStream_t);

}  // namespace tokenmill::cuda::landmark_attention
