#include "cuda/refuse.cuh"
#include "sparse/block_sparse_attention/kernel_latent.cuh"
#include "sparse/block_sparse_attention/kernel_latent_requests.cuh"
#include "sparse/sparse_decode_attention/cuda_plan.cuh"

namespace tokenmill {
namespace cuda::block_sparse_attention {

// Compiled once for each element type (kernel_latent.cu).
template <typename T>
const char* launch_latent(const LatentLaunch& d, void* workspace, cudaStream_t stream);

namespace {

int64_t decode_bytes(const LatentBlockSparse& d) {
  return visit_dtype(d.attention.dtype, [&]<typename T>() {
    return workspace_bytes(sparse_decode_attention::plan_sparse<LatentKeys<T>>(d));
  });
}

// Maps packed queries to requests. The table follows the decode kernel's part of the workspace.
const char* find_requests(LatentBlockSparse& d, cudaStream_t stream) {
  auto* const to = reinterpret_cast<int32_t*>(static_cast<char*>(d.workspace) + decode_bytes(d));
  d.requests = to;
  return launch<block_sparse_find_requests_kernel>(ceil_div(d.attention.batch, kFindThreads),
                                                   kFindThreads, 0, stream, d, to);
}

}  // namespace
}  // namespace cuda::block_sparse_attention

int64_t workspace_bytes(const LatentBlockSparse& d) {
  const int64_t requests = d.cu_seqlens_q ? d.attention.batch * sizeof(int32_t) : 0;
  return cuda::block_sparse_attention::decode_bytes(d) + requests;
}

const char* launch_cuda(const LatentBlockSparse& d, void* stream) {
  constexpr int64_t kMaxNumber = 0x7fffffff;
  const int64_t listed = cuda::sparse_decode_attention::listed_keys(d);
  if (d.attention.batch > kMaxNumber)
    return cuda::refuse("q", "must have at most 2^31 - 1 tokens on CUDA", d.attention.batch);
  if (d.cache.pages > kMaxNumber)
    return cuda::refuse("k", "must have at most 2^31 - 1 pages on CUDA", d.cache.pages);
  if (d.cache.block_table && d.cache.pages << d.cache.log2_page_size > cuda::kMaxLength)
    return cuda::refuse("k", "must have at most 2^29 tokens in pages on CUDA",
                        d.cache.pages << d.cache.log2_page_size);
  if (d.cache.capacity > cuda::kMaxLength)
    return cuda::refuse("k", "must have at most 2^29 tokens on CUDA", d.cache.capacity);
  if (listed > cuda::kMaxLength)
    return cuda::refuse("indices", "must list at most 2^29 keys of a query on CUDA", listed);
  const auto queue = static_cast<cudaStream_t>(stream);
  cuda::block_sparse_attention::LatentLaunch launch{{d, nullptr, 0, nullptr, false, 0}};
  if (d.cu_seqlens_q)
    if (const char* error = cuda::block_sparse_attention::find_requests(launch, queue))
      return error;
  return cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    return cuda::block_sparse_attention::launch_latent<T>(launch, d.workspace, queue);
  });
}

}  // namespace tokenmill
