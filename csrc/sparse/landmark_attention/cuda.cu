#include "attention/sequence.cuh"
#include "sparse/landmark_attention/cuda_plan.cuh"

namespace tokenmill {
namespace cuda::landmark_attention {
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
