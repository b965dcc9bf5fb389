#include <algorithm>

#include "core/knobs.h"
#include "cuda/launch.cuh"
#include "cuda/refuse.cuh"
#include "select/hip_block_select/kernel.cuh"

namespace tokenmill {
namespace cuda::hip_block_select {
namespace {

constexpr int kMaxShared = 97 * 1024;  // dynamic shared memory per CTA on every GPU
static_assert(kMaxShared + sizeof(HipShared<kFewWarps * kWarpSize>) <= 99 * 1024);
// 256 columns of float32, 2048 blocks per list.
static_assert(HipShape<1>::shared_bytes(17 * kSliceBytes, 2048) +
                  sizeof(HipShared<kManyWarps * kWarpSize>) <=
              99 * 1024);

int64_t blocks_of(const HipParams& p) { return p.requests() * p.lists * p.blocks; }
int64_t key_blocks(const HipParams& p) { return ceil_div(p.k.rows, p.block_k); }
// Query columns per list.
int64_t columns_of(const HipParams& p) {
  return p.group * ((std::min(p.block_q, p.queries) - 1) / p.stride_q + 1);
}
// True if each list gets an SM of its own.
bool is_alone(const HipParams& p) {
  return blocks_of(p) <= knob(Knob::hip_fill) * multiprocessors();
}

// Number of tree levels that all SMs can score in about the time in which the CTAs of the lists
// score one. A single level does not pay for its launch, nor does a tree of one level.
int levels_ahead(const HipParams& p) {
  constexpr int64_t kMaxScores = int64_t{1} << 23;  // 32 MiB
  const int64_t lists = blocks_of(p);
  if (p.exact || p.start || columns_of(p) > HipShape<1>::kColumns) return 0;
  if (lists == 0 || key_blocks(p) <= 2 * p.wanted || key_blocks(p) > kMaxScores / lists) return 0;
  int levels = 0;
  while ((lists << (levels + 1)) <= multiprocessors()) ++levels;
  return levels > 1 ? levels : 0;
}

template <typename T, int kColumnTiles, int kWarps>
const char* launch_search(const HipParams& p, const HipPlan& plan, cudaStream_t stream) {
  return launch<hip_kernel<T, kColumnTiles, kWarps>>(
      blocks_of(p), kWarps * kWarpSize,
      HipShape<kColumnTiles>::shared_bytes(plan.query_bytes, plan.wanted), stream, p, plan);
}

template <typename T>
const char* launch_ahead(const HipParams& p, HipPlan& plan, cudaStream_t stream) {
  const int64_t nodes = p.wanted * ((2 << plan.levels) - 2);
  const int64_t units = ceil_div(std::min(nodes, key_blocks(p)), plan.slots);
  plan.parts =
      static_cast<int>(std::min(ceil_div(units, kManyWarps), multiprocessors() / blocks_of(p)));
  plan.blocks = key_blocks(p);
  plan.ahead = static_cast<float*>(p.workspace);
  return launch<hip_ahead_kernel<T, 1, kManyWarps>>(
      blocks_of(p) * plan.parts, kManyWarps * kWarpSize,
      HipShape<1>::shared_bytes(plan.query_bytes, plan.wanted), stream, p, plan);
}

template <typename T>
const char* launch_search(const HipParams& p, cudaStream_t stream) {
  const int64_t columns = columns_of(p);
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
  if (!is_alone(p)) return launch_search<T, 1, kFewWarps>(p, plan, stream);
  plan.levels = levels_ahead(p);
  if (plan.levels > 0)
    if (const char* error = launch_ahead<T>(p, plan, stream)) return error;
  return launch_search<T, 1, kManyWarps>(p, plan, stream);
}

}  // namespace
}  // namespace cuda::hip_block_select

int64_t workspace_bytes(const HipParams& p) {
  namespace hip = cuda::hip_block_select;
  return hip::levels_ahead(p) > 0 ? hip::blocks_of(p) * hip::key_blocks(p) * sizeof(float) : 0;
}

const char* launch_cuda(const HipParams& p, void* stream) {
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return cuda::hip_block_select::launch_search<T>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
