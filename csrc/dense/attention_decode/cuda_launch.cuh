// Chooses blocks for the decode kernel and launches one instance of it.
#pragma once
#include "cuda/launch.cuh"
#include "dense/attention_decode/kernel.cuh"

namespace tokenmill::cuda {

constexpr int64_t kMaxAutoSplits = 128;

// One launch: its plan, and the workspace that it needs.
struct DecodeLaunch {
  DecodePlan plan;
  int64_t blocks, outputs, partial_floats;
  int shared_bytes;
};

// The row tiles of `heads` heads of a request, which have p.heads / heads query heads each, and
// `longest` keys at most. By shapes alone: lengths lie on the device. Tiles have fewer rows where
// the device has less shared memory than the largest need.
template <typename Keys>
DecodeLaunch plan_decode(const AttentionParams& p, int64_t heads, int64_t longest,
                         int64_t num_splits, bool stream_k) {
  using Shape = typename Keys::Shape;
  DecodeLaunch launch{};
  DecodePlan& plan = launch.plan;
  const int64_t rows = p.heads / heads * p.seqlen_q;
  const int most_bytes = shared_limit();
  int row_warps = Shape::kMinRowWarps;
  while (row_warps < Shape::kMaxRowWarps && 16 * row_warps < rows &&
         Shape::shared_bytes(Keys::kBytes, 2 * row_warps) <= most_bytes)
    row_warps *= 2;
  while (1 << plan.log2_row_warps < row_warps) ++plan.log2_row_warps;
  plan.group = static_cast<int>(p.heads / heads);
  plan.rows = static_cast<int>(rows);
  plan.tile_rows = 16 * row_warps;
  plan.row_tiles = static_cast<int>(ceil_div(rows, plan.tile_rows));
  launch.shared_bytes = Shape::shared_bytes(Keys::kBytes, row_warps);
  launch.outputs = p.batch * heads * plan.row_tiles;
  const int64_t filling = 2 * multiprocessors();
  // What a request has room for may be far more than what it has: never more blocks than fill.
  const int64_t worth = ceil_div(longest, kLeastSteps<Shape> * Shape::kTileKeys);
  const int64_t most = worth < 1 ? 1 : worth < kMaxAutoSplits ? worth : kMaxAutoSplits;
  if (stream_k) {
    launch.blocks = launch.outputs * most < filling ? launch.outputs * most : filling;
    launch.partial_floats = 2 * launch.blocks;
  } else {
    const int64_t wanted = launch.outputs > 0 ? ceil_div(filling, launch.outputs) : 1;
    plan.splits = static_cast<int>(num_splits > 0 ? num_splits : wanted < most ? wanted : most);
    launch.blocks = launch.outputs * plan.splits;
    // float32 sums over many keys need room of their own.
    launch.partial_floats = plan.splits > 1 || Shape::kFloat ? launch.blocks : 0;
  }
  launch.partial_floats *= plan.tile_rows * int64_t{Shape::kPartialRow};
  return launch;
}

template <typename T>
bool has_whole_chunks(const Rows& rows, int64_t columns) {
  return is_vectorizable<T>(rows.data, columns, rows.batch, rows.seq, rows.head);
}

template <typename Keys>
DecodeLaunch plan_decode(const DecodeParams& d) {
  using Cache = typename Keys::Shape::Cache;
  const AttentionParams& p = d.attention;
  DecodeLaunch launch =
      plan_decode<Keys>(p, p.kv_heads, d.cache.capacity, d.num_splits, d.stream_k);
  launch.plan.aligned = has_whole_chunks<typename Keys::Element>(p.q, p.head_dim) &&
                        has_whole_chunks<Cache>(d.cache.k, p.head_dim) &&
                        has_whole_chunks<Cache>(d.cache.v, p.value_dim);
  return launch;
}

inline int64_t workspace_bytes(const DecodeLaunch& launch) {
  return 4 * (launch.partial_floats + launch.outputs);
}

// kKernel(d, plan), whose partial sums and counters lie at `workspace`.
template <auto kKernel, typename Params>
const char* launch_planned(const Params& d, DecodeLaunch planned, void* workspace,
                           cudaStream_t stream) {
  DecodePlan& plan = planned.plan;
  plan.partials = static_cast<float*>(workspace);
  plan.arrived = reinterpret_cast<int*>(plan.partials + planned.partial_floats);
  if (const char* error = set_bytes(plan.arrived, 0, planned.outputs * sizeof(int), stream))
    return error;
  return launch<kKernel>(planned.blocks, kDecodeThreads, planned.shared_bytes, stream, d, plan);
}

template <typename T, int kBucket>
const char* launch_decode(const DecodeParams& d, cudaStream_t stream) {
  constexpr bool kLatent = kBucket == kLatentBucket;
  const DecodeLaunch planned = plan_decode<CacheKeys<T, kBucket, kLatent>>(d);
  if constexpr (kLatent)
    return launch_planned<attention_decode_kernel<T, kBucket, true>>(d, planned, d.workspace,
                                                                     stream);
  else
    return d.attention.mask.any() ? launch_planned<attention_decode_kernel<T, kBucket, true>>(
                                        d, planned, d.workspace, stream)
                                  : launch_planned<attention_decode_kernel<T, kBucket, false>>(
                                        d, planned, d.workspace, stream);
}

// visit.operator()<bucket>()
template <typename Visit>
auto visit_bucket(const AttentionParams& p, const Visit& visit) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return visit.template operator()<64>();
  if (dim <= 128) return visit.template operator()<128>();
  if (dim <= 256) return visit.template operator()<256>();
  return visit.template operator()<kLatentBucket>();
}
// The same of Float8 caches: one instance for all that are narrow.
template <typename Visit>
auto visit_float8_bucket(const AttentionParams& p, const Visit& visit) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 128) return visit.template operator()<128>();
  if (dim <= 256) return visit.template operator()<256>();
  return visit.template operator()<kLatentBucket>();
}

template <typename T>
const char* launch_decode(const DecodeParams& d, cudaStream_t stream) {
  return visit_bucket(d.attention,
                      [&]<int kBucket>() { return launch_decode<T, kBucket>(d, stream); });
}

}  // namespace tokenmill::cuda
