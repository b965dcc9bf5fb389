#include "attention/mask_bounds.cuh"
#include "core/knobs.h"
#include "cuda/refuse.cuh"
#include "dense/attention/choose_sm90.h"
#include "dense/attention/kernel.cuh"

namespace tokenmill {
namespace cuda {

extern template const char* launch_forward<__half>(const AttentionParams&, const MaskBounds&,
                                                   cudaStream_t);
extern template const char* launch_forward<__nv_bfloat16>(const AttentionParams&, const MaskBounds&,
                                                          cudaStream_t);
extern template const char* launch_forward<float>(const AttentionParams&, const MaskBounds&,
                                                  cudaStream_t);

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
  const auto on = static_cast<cudaStream_t>(stream);
  if (cuda::kHasSm90 && knob(Knob::attention_sm90) && cuda::takes_sm90(p) &&
      cuda::compute_capability() == 90) {
    const char* error = cuda::launch_on_sm90(p, {}, on);
    if (error != cuda::kNotMapped) return error;
  }
  if (p.mask.any())
    if (const char* error = cuda::launch_bounds(p, m.bounds, on)) return error;
  return cuda::visit_dtype(p.dtype,
                           [&]<typename T>() { return cuda::launch_forward<T>(p, m.bounds, on); });
}

}  // namespace tokenmill
