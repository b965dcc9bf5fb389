#include "cuda/refuse.cuh"
#include "dense/attention_decode/cuda_launch.cuh"

namespace tokenmill {
namespace cuda {

extern template const char* launch_decode<__half>(const DecodeParams&, cudaStream_t);
extern template const char* launch_decode<__nv_bfloat16>(const DecodeParams&, cudaStream_t);
extern template const char* launch_decode<float>(const DecodeParams&, cudaStream_t);

}  // namespace cuda

int64_t workspace_bytes(const DecodeParams& d) {
  return cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    return cuda::visit_bucket(d.attention, [&]<int kBucket>() {
      return cuda::workspace_bytes(cuda::plan_decode<T, kBucket>(d));
    });
  });
}

const char* launch_cuda(const DecodeParams& d, void* stream) {
  if (d.cache.capacity > cuda::kMaxLength)
    return cuda::refuse("k_cache", "must have room for at most 2^29 keys of a request on CUDA",
                        d.cache.capacity);
  if (d.cache.pages > 0x7fffffff)
    return cuda::refuse("k_cache", "must have at most 2^31 - 1 pages on CUDA", d.cache.pages);
  return cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    return cuda::launch_decode<T>(d, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
