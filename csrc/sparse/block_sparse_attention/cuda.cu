#include "core/knobs.h"
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
  if constexpr (kHasSm90 && !std::is_same_v<T, float>)
    if (knob(Knob::block_sparse_attention_sm90) && takes_sm90(d) && compute_capability() == 90)
      return launch_block_sparse_sm90<T>(d, stream);
  return kNotMapped;
}

}  // namespace cuda::block_sparse_attention

const char* launch_cuda(const BlockSparseParams& d, void* stream) {
  using namespace cuda::block_sparse_attention;
  if (const char* error = check_sizes(d)) return error;
  const auto queue = static_cast<cudaStream_t>(stream);
  return cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    const char* error = launch_on_sm90<T>(d, queue);
    if (error != cuda::kNotMapped) return error;
    return has_requests(d) ? launch_forward_of_requests(d, queue)
                           : launch_block_sparse<T>(d, queue);
  });
}

}  // namespace tokenmill
