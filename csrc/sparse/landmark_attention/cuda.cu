#include "sparse/landmark_attention/cuda_backward_launch.cuh"

namespace tokenmill {
namespace cuda::landmark_attention {

extern template const char* launch_landmark<__half>(const LandmarkParams&, cudaStream_t);
extern template const char* launch_landmark<__nv_bfloat16>(const LandmarkParams&, cudaStream_t);
extern template const char* launch_landmark<float>(const LandmarkParams&, cudaStream_t);
extern template const char* launch_landmark<__half>(const LandmarkBackwardParams&, cudaStream_t);
extern template const char* launch_landmark<__nv_bfloat16>(const LandmarkBackwardParams&,
                                                           cudaStream_t);
extern template const char* launch_landmark<float>(const LandmarkBackwardParams&, cudaStream_t);

namespace {

template <typename Params>
const char* launch_any(const AttentionParams& p, const Params& d, void* stream) {
  if (p.seqlen_q > kMaxLength) return "sequences may have 2^29 tokens at most on CUDA";
  return visit_dtype(p.dtype, [&]<typename T>() {
    return launch_landmark<T>(d, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace
}  // namespace cuda::landmark_attention

const char* launch_cuda(const LandmarkParams& d, void* stream) {
  return cuda::landmark_attention::launch_any(d.attention, d, stream);
}

const char* launch_cuda(const LandmarkBackwardParams& g, void* stream) {
  return cuda::landmark_attention::launch_any(g.attention.forward, g, stream);
}

}  // namespace tokenmill
