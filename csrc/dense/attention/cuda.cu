#include "attention/mask_bounds.cuh"
#include "attention/sequence.cuh"
#include "cuda/choose.h"
#include "cuda/refuse.cuh"
#include "cuda/vector.cuh"
#include "dense/attention/kernels.h"
#include "dense/attention/launch.cuh"

namespace tokenmill {
namespace cuda {

const char* launch_on_sm80(const Masked<AttentionParams>& m, void* stream) {
  const AttentionParams& p = m.params;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.mask.any())
    if (const char* error = launch_bounds(p, m.bounds, on)) return error;
  return visit_dtype(p.dtype, [&]<typename T>() { return launch_forward<T>(p, m.bounds, on); });
}

#if defined(TOKENMILL_SM90)
const char* launch_forward_sm90(const AttentionParams& p, const KvCache& cache, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const bool softmax = p.map == ScoreMap::softmax;
  if (p.dtype == DType::float16)
    return softmax ? launch_forward_sm90<__half, Weights::softmax>(p, cache, on)
                   : launch_forward_sm90<__half, Weights::sigmoid>(p, cache, on);
  return softmax ? launch_forward_sm90<__nv_bfloat16, Weights::softmax>(p, cache, on)
                 : launch_forward_sm90<__nv_bfloat16, Weights::sigmoid>(p, cache, on);
}

const char* launch_on_sm90(const Masked<AttentionParams>& m, void* stream) {
  return launch_forward_sm90(m.params, {}, stream);
}
#endif

}  // namespace cuda

const char* launch_cuda(const Masked<AttentionParams>& m, void* stream) {
  const AttentionParams& p = m.params;
  if (p.seqlen_q > cuda::kMaxLength)
    return cuda::refuse("q", "must have at most 2^29 tokens on CUDA", p.seqlen_q);
  if (p.seqlen_k > cuda::kMaxLength)
    return cuda::refuse("k", "must have at most 2^29 tokens on CUDA", p.seqlen_k);
  if (p.batch * p.heads > 0x7fffffff)
    return cuda::refuse("q", "must have at most 2^31 - 1 heads in all sequences on CUDA",
                        p.batch * p.heads);
  return cuda::launch_first(kernels_of(m), m, stream);
}

}  // namespace tokenmill
