#include "dense/attention/kernel_backward_rows.cuh"
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
  const auto queue = static_cast<cudaStream_t>(stream);
  const AttentionParams& f = p.forward.attention;
  const char* error = cuda::visit_dtype(f.dtype, [&]<typename T>() {
    return cuda::block_sparse_attention::launch_block_sparse<T>(p, queue);
  });
  if (error || !p.dsink) return error;
  cuda::BackwardArgs args = cuda::block_sparse_attention::statistics_of(p);
  args.p.dsink = p.dsink;
  return cuda::launch<cuda::sum_kernel>(f.batch * f.heads, cuda::kSumThreads, 0, queue, args, 1);
}

}  // namespace tokenmill
