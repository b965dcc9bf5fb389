#include "dense/attention_decode/cuda_launch.cuh"

namespace tokenmill {
namespace cuda {

template <>
const char* launch_decode<__half>(const DecodeParams&, cudaStream_t);
template <>
const char* launch_decode<__nv_bfloat16>(const DecodeParams&, cudaStream_t);
template <>
const char* launch_decode<float>(const DecodeParams&, cudaStream_t);

}  // namespace cuda

int64_t workspace_bytes(const DecodeParams& d) {
  int64_t bytes = 0;
  cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    bytes = cuda::visit_bucket(d.attention, [&]<int kBucket>() {
      return cuda::workspace_bytes(cuda::plan_decode<T, kBucket>(d));
    });
  });
  return bytes;
}

const char* launch_cuda(const DecodeParams& d, void* stream) {
  if (d.cache.capacity > cuda::kMaxLength)
    return "a request may have room for 2^29 keys at most on CUDA";
  if (d.cache.pages > 0x7fffffff) return "a cache may have 2^31 - 1 pages at most on CUDA";
  const char* error = nullptr;
  cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    error = cuda::launch_decode<T>(d, static_cast<cudaStream_t>(stream));
  });
  return error;
}

}  // namespace tokenmill
