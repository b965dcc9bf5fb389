#include "cuda/capability.h"
#include "sparse/block_sparse_attention/cuda_launch.cuh"
#include "sparse/block_sparse_attention/launch_sm90.h"
#include "sparse/block_sparse_attention/requests.cuh"

namespace tokenmill {
namespace cuda::block_sparse_attention {

extern template const char* launch_block_sparse<__half>(const BlockSparseParams&, cudaStream_t);
extern template const char* launch_block_sparse<__nv_bfloat16>(const BlockSparseParams&,
                                                               cudaStream_t);
extern template const char* launch_block_sparse<float>(const BlockSparseParams&, cudaStream_t);

template <typename T>
const char* launch_on_sm90(const BlockSparseParams& d, cudaStream_t stream) {
  if constexpr (kHasSm90) return launch_block_sparse_sm90<T>(d, stream);
  return nullptr;
}

}  // namespace cuda::block_sparse_attention

const char* launch_cuda(const BlockSparseParams& d, void* stream) {
  if (const char* error = cuda::block_sparse_attention::check_sizes(d)) return error;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (cuda::kHasSm90 && cuda::block_sparse_attention::takes_sm90(d) &&
      cuda::compute_capability() == 90) {
    const bool half = d.attention.dtype == DType::float16;
    const char* error = half
                            ? cuda::block_sparse_attention::launch_on_sm90<__half>(d, queue)
                            : cuda::block_sparse_attention::launch_on_sm90<__nv_bfloat16>(d, queue);
    if (error != cuda::kNotMapped) return error;
  }
  if (cuda::block_sparse_attention::has_requests(d))
    return cuda::block_sparse_attention::launch_forward_of_requests(d, queue);
  return cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    return cuda::block_sparse_attention::launch_block_sparse<T>(d, queue);
  });
}

}  // namespace tokenmill
