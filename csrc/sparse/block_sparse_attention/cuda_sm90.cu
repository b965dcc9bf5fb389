#include "sparse/block_sparse_attention/launch_sm90.h"

#if defined(TOKENMILL_SM90)
namespace tokenmill::cuda::block_sparse_attention {

const char* launch_on_sm90(const BlockSparseParams& d, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return d.attention.dtype == DType::float16 ? launch_block_sparse_sm90<__half>(d, on)
                                             : launch_block_sparse_sm90<__nv_bfloat16>(d, on);
}

}  // namespace tokenmill::cuda::block_sparse_attention
#endif
