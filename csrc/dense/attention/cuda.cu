#include "dense/attention/cuda_launch.cuh"

namespace tokenmill {
namespace cuda {

extern template const char* launch_forward<__half>(const AttentionParams&, cudaStream_t);
extern template const char* launch_forward<__nv_bfloat16>(const AttentionParams&, cudaStream_t);
extern template const char* launch_forward<float>(const AttentionParams&, cudaStream_t);

}  // namespace cuda

const char* launch_cuda(const AttentionParams& p, void* stream) {
  if (p.seqlen_q > cuda::kMaxLength || p.seqlen_k > cuda::kMaxLength)
    return "sequences may have 2^29 tokens at most on CUDA";
  if (p.batch * p.heads > 0x7fffffff) return "batch * heads may be 2^31 - 1 at most on CUDA";
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return cuda::launch_forward<T>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
