// Decode over a KV cache of the queries' element type.
#include "dense/attention_decode/cuda_plan.cuh"
#include "dense/attention_decode/kernel.cuh"

namespace tokenmill::cuda {

template <typename T, int kBucket>
const char* launch_decode(const DecodeParams& d, cudaStream_t stream) {
  constexpr bool kLatent = kBucket == kLatentBucket;
  const DecodeLaunch planned = plan_decode<CacheKeys<T, kBucket, kLatent>>(d);
  if constexpr (kLatent)
    return launch_planned<attention_decode_kernel<T, kBucket, true>>(d, planned, d.workspace,
                                                                     stream);
  else
    return d.attention.mask.any() ? launch_planned<attention_decode_kernel<T, kBucket, true>>(
                                        d, planned, d.workspace, stream)
                                  : launch_planned<attention_decode_kernel<T, kBucket, false>>(
                                        d, planned, d.workspace, stream);
}

template <typename T>
const char* launch_decode(const DecodeParams& d, cudaStream_t stream) {
  return visit_bucket(d.attention,
                      [&]<int kBucket>() { return launch_decode<T, kBucket>(d, stream); });
}

template const char* launch_decode<TOKENMILL_ELEMENT>(const DecodeParams&, cudaStream_t);

}  // namespace tokenmill::cuda
