// Decode over a KV cache of the queries' element type.
#include "sparse/sparse_decode_attention/cuda_plan.cuh"
#include "sparse/sparse_decode_attention/kernel.cuh"

namespace tokenmill::cuda::sparse_decode_attention {

template <typename T, int kBucket>
const char* launch_sparse(const SparseLaunch& d, void* workspace, cudaStream_t stream) {
  return launch_listed<sparse_decode_kernel<T, kBucket>, ListedKeys<T, kBucket>>(d, workspace,
                                                                                 stream);
}

template <typename T>
const char* launch_sparse(const SparseLaunch& d, void* workspace, cudaStream_t stream) {
  return visit_bucket(
      d.attention, [&]<int kBucket>() { return launch_sparse<T, kBucket>(d, workspace, stream); });
}

template const char* launch_sparse<TOKENMILL_ELEMENT>(const SparseLaunch&, void*, cudaStream_t);

}  // namespace tokenmill::cuda::sparse_decode_attention
