// Launch of the forward of latent heads.
#include "sparse/block_sparse_attention/kernel_latent.cuh"
#include "sparse/sparse_decode_attention/cuda_plan.cuh"

namespace tokenmill::cuda::block_sparse_attention {

template <typename T>
const char* launch_latent(const LatentLaunch& d, void* workspace, cudaStream_t stream) {
  using sparse_decode_attention::launch_listed;
  return launch_listed<block_sparse_latent_kernel<T>, LatentKeys<T>>(d, workspace, stream);
}

template const char* launch_latent<TOKENMILL_ELEMENT>(const LatentLaunch&, void*, cudaStream_t);

}  // namespace tokenmill::cuda::block_sparse_attention
