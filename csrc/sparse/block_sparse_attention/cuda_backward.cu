#include "attention/backward_rows.cuh"
#include "cuda/choose.h"
#include "sparse/block_sparse_attention/cuda_backward_plan.cuh"
#include "sparse/block_sparse_attention/kernels.h"
#include "sparse/block_sparse_attention/launch_backward_sm90.h"

namespace tokenmill {
namespace cuda::block_sparse_attention {

const char* launch_on_sm80(const BlockSparseBackwardParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const AttentionParams& f = p.forward.attention;
  return visit_dtype(f.dtype, [&]<typename T>() {
    return f.cu_seqlens_q ? launch_requests<T>(p, on) : launch_block_sparse<T>(p, on);
  });
}

#if defined(TOKENMILL_SM90)
const char* launch_on_sm90(const BlockSparseBackwardParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto launch_gradients = [&]<typename T>() {
    BlockSparseGradients d;
    if (const char* error = launch_statistics<T>(with_ends_of_keys(p), on, d)) return error;
    return launch_gradients_sm90<T>(p, d, on);
  };
  return p.forward.attention.dtype == DType::float16
             ? launch_gradients.template operator()<__half>()
             : launch_gradients.template operator()<__nv_bfloat16>();
}
#endif

}  // namespace cuda::block_sparse_attention

int64_t workspace_bytes(const BlockSparseBackwardParams& p) {
  return 2 * sizeof(float) * cuda::block_sparse_attention::statistics_rows(p.forward.attention);
}

const char* launch_cuda(const BlockSparseBackwardParams& p, void* stream) {
  if (const char* error = cuda::block_sparse_attention::check_sizes(p.forward)) return error;
  const char* const error = cuda::launch_first(kernels_of(p), p, stream);
  if (error || !p.dsink) return error;
  using namespace cuda::block_sparse_attention;
  cuda::BackwardArgs args = statistics_of(with_ends_of_keys(p));
  args.p.dsink = p.dsink;
  const AttentionParams& f = p.forward.attention;
  return cuda::launch<cuda::sum_kernel>(f.batch * f.heads, cuda::kSumThreads, 0,
                                        static_cast<cudaStream_t>(stream), args, 1);
}

}  // namespace tokenmill
