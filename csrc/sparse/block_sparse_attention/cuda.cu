#include "cuda/choose.h"
#include "sparse/block_sparse_attention/cuda_launch.cuh"
#include "sparse/block_sparse_attention/kernels.h"
#include "sparse/block_sparse_attention/requests.cuh"

namespace tokenmill {
namespace cuda::block_sparse_attention {

extern template const char* launch_block_sparse<__half>(const BlockSparseParams&, cudaStream_t);
extern template const char* launch_block_sparse<__nv_bfloat16>(const BlockSparseParams&,
                                                               cudaStream_t);
extern template const char* launch_block_sparse<float>(const BlockSparseParams&, cudaStream_t);

const char* launch_on_sm80(const BlockSparseParams& d, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (has_requests(d)) return launch_forward_of_requests(d, on);
  return visit_dtype(d.attention.dtype,
                     [&]<typename T>() { return launch_block_sparse<T>(d, on); });
}

}  // namespace cuda::block_sparse_attention

const char* launch_cuda(const BlockSparseParams& d, void* stream) {
  if (const char* error = cuda::block_sparse_attention::check_sizes(d)) return error;
  return cuda::launch_first(kernels_of(d), d, stream);
}

}  // namespace tokenmill
