// Prefill over a KV cache of the queries' element type.
#include "attention/forward_kernel.cuh"
#include "dense/attention_decode/cuda_plan.cuh"

namespace tokenmill::cuda {

template <typename T>
const char* launch_prefill(const DecodeParams& d, const MaskBounds& bounds, int max_queries,
                           cudaStream_t stream) {
  const AttentionParams& p = d.attention;
  return visit_forward_bucket(p, [&]<int kBucket>(Index<kBucket>) {
    return launch_forward<T, kBucket, Weights::any, true, T>(p, bounds, stream, d.cache,
                                                             max_queries);
  });
}

template const char* launch_prefill<TOKENMILL_ELEMENT>(const DecodeParams&, const MaskBounds&, int,
                                                       cudaStream_t);

}  // namespace tokenmill::cuda
