// Decode over a float8_e4m3fn KV cache.
#include "dense/attention_decode/cuda_plan.cuh"
#include "dense/attention_decode/kernel.cuh"

namespace tokenmill::cuda {

template <typename T>
const char* launch_float8(const DecodeParams& d, cudaStream_t stream) {
  return visit_float8_bucket(d.attention, [&]<int kBucket>() {
    return launch_planned<attention_decode_float8_kernel<T, kBucket>>(
        d, plan_decode<CacheKeys<T, kBucket, true, Float8>>(d), d.workspace, stream);
  });
}

template const char* launch_float8<TOKENMILL_ELEMENT>(const DecodeParams&, cudaStream_t);

}  // namespace tokenmill::cuda
