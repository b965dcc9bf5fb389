#include <algorithm>

#include "core/knobs.h"
#include "cuda/launch.cuh"
#include "cuda/refuse.cuh"
#include "select/hip_block_select/kernel.cuh"

namespace tokenmill {
namespace cuda::hip_block_select {
namespace {

constexpr int kMaxShared = 97 * 1024;  // of a block on every device, beside what is static
static_assert(kMaxShared + sizeof(HipShared<kFewWarps * kWarpSize>) <= 99 * 1024);
// 256 columns of float32, 2048 blocks of a list.
static_assert(HipShape<1>::shared_bytes(17 * kSliceBytes, 2048) +
                  sizeof(HipShared<kManyWarps * kWarpSize>) <=
              99 * 1024);

int64_t blocks_of(const HipParams& p) { return p.requests() * p.lists * p.blocks; }

template <typename T, int kColumnTiles, int kWarps>
const char* launch_search(const HipParams& p, const HipPlan& plan, cudaStream_t stream) {
  return launch<hip_kernel<T, kColumnTiles, kWarps>>(
      blocks_of(p), kWarps * kWarpSize,
      HipShape<kColumnTiles>::shared_bytes(plan.query_bytes, plan.wanted), stream, p, plan);
}

template <typename T>
const char* launch_search(const HipParams& p, cudaStream_t stream) {
  const int64_t columns = p.group * ((std::min(p.block_q, p.queries) - 1) / p.stride_q + 1);
  if (columns > 0x7fffff00)
    return refuse("q", "must have at most 2^31 - 256 queries of a block for a key head on CUDA",
                  columns);
  HipPlan plan{};
  plan.wanted = static_cast<int>(p.wanted);
  const bool packed = p.block_k <= kScoreRows / 2 && kScoreRows % p.block_k == 0;
  plan.slots = packed ? static_cast<int>(kScoreRows / p.block_k) : 1;
  plan.chunks = static_cast<int>(ceil_div(p.head_dim * sizeof(T), kChunkBytes));
  plan.slices = static_cast<int>(ceil_div(plan.chunks * kChunkBytes, kSliceBytes));
  plan.query_bytes = (plan.slices | 1) * kSliceBytes;
  for (int64_t span = std::min(p.restart_span, p.k.rows); span > 1; span = ceil_div(span, 2))
    ++plan.rounds;
  plan.keys_aligned = is_vectorizable<T>(p.k.data, p.head_dim, p.k.batch, p.k.seq, p.k.head);
  plan.queries_aligned = is_vectorizable<T>(p.q.data, p.head_dim, p.q.batch, p.q.seq, p.q.head);
  constexpr int kWide = 8;
  if (columns > 8 && HipShape<kWide>::shared_bytes(plan.query_bytes, plan.wanted) <= kMaxShared)
    return launch_search<T, kWide, kFewWarps>(p, plan, stream);
  return blocks_of(p) <= knob(Knob::hip_fill) * multiprocessors()
             ? launch_search<T, 1, kManyWarps>(p, plan, stream)
             : launch_search<T, 1, kFewWarps>(p, plan, stream);
}

}  // namespace
}  // namespace cuda::hip_block_select

const char* launch_cuda(const HipParams& p, void* stream) {
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return cuda::hip_block_select::launch_search<T>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
