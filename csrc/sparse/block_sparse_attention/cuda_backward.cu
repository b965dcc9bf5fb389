#include "dense/attention/kernel_backward_rows.cuh"
#include "sparse/block_sparse_attention/cuda_requests_backward_launch.cuh"

namespace tokenmill {
namespace cuda::block_sparse_attention {

extern template const char* launch_block_sparse<__half>(const BlockSparseBackwardParams&,
                                                        cudaStream_t);
extern template const char* launch_block_sparse<__nv_bfloat16>(const BlockSparseBackwardParams&,
                                                               cudaStream_t);
extern template const char* launch_block_sparse<float>(const BlockSparseBackwardParams&,
                                                       cudaStream_t);
extern template const char* launch_requests<__half>(const BlockSparseBackwardParams&, cudaStream_t);
extern template const char* launch_requests<__nv_bfloat16>(const BlockSparseBackwardParams&,
                                                           cudaStream_t);
extern template const char* launch_requests<float>(const BlockSparseBackwardParams&, cudaStream_t);

}  // namespace cuda::block_sparse_attention

int64_t workspace_bytes(const BlockSparseBackwardParams& p) {
  return 2 * sizeof(float) * cuda::block_sparse_attention::statistics_rows(p.forward.attention);
}

const char* launch_cuda(const BlockSparseBackwardParams& p, void* stream) {
  if (const char* error = cuda::block_sparse_attention::check_sizes(p.forward)) return error;
  const auto queue = static_cast<cudaStream_t>(stream);
  const AttentionParams& f = p.forward.attention;
  const char* error = cuda::visit_dtype(f.dtype, [&]<typename T>() {
    using namespace cuda::block_sparse_attention;
    return f.cu_seqlens_q ? launch_requests<T>(p, queue) : launch_block_sparse<T>(p, queue);
  });
  if (error || !p.dsink) return error;
  using namespace cuda::block_sparse_attention;
  cuda::BackwardArgs args = statistics_of(with_ends_of_keys(p));
  args.p.dsink = p.dsink;
  return cuda::launch<cuda::sum_kernel>(f.batch * f.heads, cuda::kSumThreads, 0, queue, args, 1);
}

}  // namespace tokenmill
