#include "cuda/refuse.cuh"
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernel_mass.cuh"

namespace tokenmill {
namespace cuda::block_sparse_attention {
namespace {

template <typename T, int kBucket>
const char* launch_mass(const BlockSparseMass& d, cudaStream_t stream) {
  using Shape = MassShape<T, kBucket>;
  const AttentionParams& p = d.attention;
  MassLaunch m{d};
  m.keys = KeyRows::of<T>(p.k, d.pages);
  const int64_t block = int64_t{1} << d.log2_block_k;
  const int64_t owned = block > Shape::kBlockKeys ? block : Shape::kBlockKeys;
  m.parts = static_cast<int>(ceil_div(d.list.entries << d.log2_block_k, owned));
  m.blocks = max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, int64_t{1} << d.log2_block_q);
  m.aligned = has_whole_chunks<T>(p.q, p.head_dim);
  m.leaves_out = p.head_dim > 256 || p.value_dim > 256;  // latent heads
  m.factor = p.scale * kLog2e;
  const int64_t blocks = (p.cu_seqlens_q ? 1 : p.batch) * d.list.heads * m.blocks * m.parts;
  const int bytes = Shape::kSharedBytes;
  return has_requests(d) ? launch<block_sparse_mass_kernel<T, kBucket, MassRequests>>(
                               blocks, kMassThreads, bytes, stream, m)
                         : launch<block_sparse_mass_kernel<T, kBucket, MassBlocks>>(
                               blocks, kMassThreads, bytes, stream, m);
}

}  // namespace
}  // namespace cuda::block_sparse_attention

const char* launch_cuda(const BlockSparseMass& d, void* stream) {
  return cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    const auto queue = static_cast<cudaStream_t>(stream);
    const int64_t dim = d.attention.head_dim;
    using namespace cuda::block_sparse_attention;
    return dim <= 64    ? launch_mass<T, 64>(d, queue)
           : dim <= 128 ? launch_mass<T, 128>(d, queue)
           : dim <= 256 ? launch_mass<T, 256>(d, queue)
                        : launch_mass<T, 576>(d, queue);  // latent heads
  });
}

}  // namespace tokenmill
