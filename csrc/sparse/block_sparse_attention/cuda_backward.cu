#include "sparse/block_sparse_attention/cuda_backward_launch.cuh"

namespace tokenmill {
namespace cuda::block_sparse_attention {

extern template const char* launch_block_sparse<__half>(const BlockSparseBackwardParams&,
                                                        cudaStream_t);
extern template const char* launch_block_sparse<__nv_bfloat16>(const BlockSparseBackwardParams&,
                                                               cudaStream_t);
extern template const char* launch_block_sparse<float>(const BlockSparseBackwardParams&,
                                                       cudaStream_t);

}  // namespace cuda::block_sparse_attention

int64_t workspace_bytes(const BlockSparseBackwardParams& p) {
  const AttentionParams& f = p.forward.attention;
  return 2 * sizeof(float) * f.batch * f.heads * f.seqlen_q;
}

const char* launch_cuda(const BlockSparseBackwardParams& p, void* stream) {
  if (const char* error = cuda::block_sparse_attention::check_sizes(p.forward)) return error;
  return cuda::visit_dtype(p.forward.attention.dtype, [&]<typename T>() {
    return cuda::block_sparse_attention::launch_block_sparse<T>(p,
                                                                static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
