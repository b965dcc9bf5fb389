#include "attention/mask_bounds.cuh"
#include "cuda/choose.h"
#include "cuda/refuse.cuh"
#include "dense/attention/kernel.cuh"
#include "dense/attention/kernels.h"

namespace tokenmill {
namespace cuda {

extern template const char* launch_forward<__half>(const AttentionParams&, const MaskBounds&,
                                                   cudaStream_t);
extern template const char* launch_forward<__nv_bfloat16>(const AttentionParams&, const MaskBounds&,
                                                          cudaStream_t);
extern template const char* launch_forward<float>(const AttentionParams&, const MaskBounds&,
                                                  cudaStream_t);

const char* launch_on_sm80(const Masked<AttentionParams>& m, void* stream) {
  const AttentionParams& p = m.params;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.mask.any())
    if (const char* error = launch_bounds(p, m.bounds, on)) return error;
  return visit_dtype(p.dtype, [&]<typename T>() { return launch_forward<T>(p, m.bounds, on); });
}

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
