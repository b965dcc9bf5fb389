#include "attention/backward_rows.cuh"
#include "core/knobs.h"
#include "cuda/capability.h"
#include "sparse/block_sparse_attention/cuda_requests_backward_launch.cuh"
#include "sparse/block_sparse_attention/launch_backward_sm90.h"

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

template <typename T>
const char* launch_on_sm90(const BlockSparseBackwardParams& p, cudaStream_t stream) {
  if constexpr (kHasSm90 && !std::is_same_v<T, float>) {
    if (knob(Knob::block_sparse_attention_sm90_backward) && takes_backward_sm90(p) &&
        compute_capability() == 90) {
      BlockSparseGradients d;
      if (const char* error = launch_statistics<T>(with_ends_of_keys(p), stream, d)) return error;
      return launch_gradients_sm90<T>(p, d, stream);
    }
  }
  return kNotMapped;
}

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
    const char* error = launch_on_sm90<T>(p, queue);
    if (error != cuda::kNotMapped) return error;
    return f.cu_seqlens_q ? launch_requests<T>(p, queue) : launch_block_sparse<T>(p, queue);
  });
  if (error || !p.dsink) return error;
  using namespace cuda::block_sparse_attention;
  cuda::BackwardArgs args = statistics_of(with_ends_of_keys(p));
  args.p.dsink = p.dsink;
  return cuda::launch<cuda::sum_kernel>(f.batch * f.heads, cuda::kSumThreads, 0, queue, args, 1);
}

}  // namespace tokenmill
