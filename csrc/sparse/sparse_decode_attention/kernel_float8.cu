// Decode over a float8_e4m3fn KV cache.
#include "sparse/sparse_decode_attention/cuda_plan.cuh"
#include "sparse/sparse_decode_attention/kernel.cuh"

namespace tokenmill::cuda::sparse_decode_attention {

template <typename T>
const char* launch_float8(const SparseLaunch& d, void* workspace, cudaStream_t stream) {
  return visit_float8_bucket(d.attention, [&]<int kBucket>() {
    return launch_listed<sparse_decode_float8_kernel<T, kBucket>, ListedKeys<T, kBucket, Float8>>(
        d, workspace, stream);
  });
}

template const char* launch_float8<TOKENMILL_ELEMENT>(const SparseLaunch&, void*, cudaStream_t);

}  // namespace tokenmill::cuda::sparse_decode_attention
