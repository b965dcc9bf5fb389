#include "cuda/choose.h"
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernels.h"
#include "sparse/block_sparse_attention/launch_sm90.h"

namespace tokenmill {
namespace cuda::block_sparse_attention {

const char* launch_on_sm80(const BlockSparseParams& d, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return visit_dtype(d.attention.dtype, [&]<typename T>() {
    return has_requests(d) ? launch_requests<T>(d, on) : launch_block_sparse<T>(d, on);
  });
}

#if defined(TOKENMILL_SM90)
const char* launch_on_sm90(const BlockSparseParams& d, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return d.attention.dtype == DType::float16 ? launch_block_sparse_sm90<__half>(d, on)
                                             : launch_block_sparse_sm90<__nv_bfloat16>(d, on);
}
#endif

}  // namespace cuda::block_sparse_attention

const char* launch_cuda(const BlockSparseParams& d, void* stream) {
  if (const char* error = cuda::block_sparse_attention::check_sizes(d)) return error;
  return cuda::launch_first(kernels_of(d), d, stream);
}

}  // namespace tokenmill
