#include "cuda/launch.cuh"
#include "cuda/refuse.cuh"
#include "tokens/topk_partition/kernel.cuh"

namespace tokenmill {
namespace cuda::topk_partition {
namespace {

int64_t sort_stride(const TopkPartitionParams& p) {
  if (!p.by_score || p.k <= kSharedSort) return 0;
  int64_t size = 1;
  while (size < p.k) size *= 2;
  return size;
}

}  // namespace
}  // namespace cuda::topk_partition

int64_t workspace_bytes(const TopkPartitionParams& p) {
  return p.batch * cuda::topk_partition::sort_stride(p) * static_cast<int64_t>(sizeof(uint64_t));
}

const char* launch_cuda(const TopkPartitionParams& p, void* stream) {
  using namespace cuda;
  using namespace cuda::topk_partition;
  const PartitionMemory memory{sort_stride(p) > 0 ? static_cast<uint64_t*>(p.workspace) : nullptr,
                               sort_stride(p)};
  if (memory.sort_stride > int64_t{1} << 30)
    return refuse("k", "must be at most 2^30 in the order of the scores on CUDA", p.k);
  return visit_dtype(p.dtype, [&]<typename T>() {
    return launch<topk_partition_kernel<T>>(p.batch < kMaxGrid ? p.batch : kMaxGrid, kTopkThreads,
                                            0, static_cast<cudaStream_t>(stream), p, memory);
  });
}

}  // namespace tokenmill
