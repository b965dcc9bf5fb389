// Prefill over a float8_e4m3fn KV cache.
#include "attention/forward_kernel.cuh"
#include "dense/attention_decode/cuda_plan.cuh"

namespace tokenmill::cuda {

// One instance for all narrow heads.
template <typename T>
const char* launch_prefill_float8(const DecodeParams& d, const MaskBounds& bounds,
                                  cudaStream_t stream) {
  const AttentionParams& p = d.attention;
  if (p.head_dim <= 128 && p.value_dim <= 128)
    return launch_forward<T, 128, Weights::any, true, Float8>(p, bounds, stream, d.cache);
  return launch_forward<T, 256, Weights::any, true, Float8>(p, bounds, stream, d.cache);
}

template const char* launch_prefill_float8<TOKENMILL_ELEMENT>(const DecodeParams&,
                                                              const MaskBounds&, cudaStream_t);

}  // namespace tokenmill::cuda
