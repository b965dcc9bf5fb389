#include "sparse/block_sparse_attention/cuda_requests_launch.cuh"
#include "sparse/block_sparse_attention/requests.cuh"

namespace tokenmill::cuda::block_sparse_attention {

extern template const char* launch_requests<__half>(const BlockSparseParams&, cudaStream_t);
extern template const char* launch_requests<__nv_bfloat16>(const BlockSparseParams&, cudaStream_t);
extern template const char* launch_requests<float>(const BlockSparseParams&, cudaStream_t);

const char* launch_forward_of_requests(const BlockSparseParams& d, cudaStream_t stream) {
  return visit_dtype(d.attention.dtype,
                     [&]<typename T>() { return launch_requests<T>(d, stream); });
}

}  // namespace tokenmill::cuda::block_sparse_attention
