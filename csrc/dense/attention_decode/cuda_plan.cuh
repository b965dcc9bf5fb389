// Grid and splits of the decode kernels, and their launch.
#pragma once
#include "attention/mask_bounds.h"
#include "cuda/launch.cuh"
#include "dense/attention_decode/kernel_shape.cuh"

namespace tokenmill::cuda {

template <typename T>
bool has_whole_chunks(const Rows& rows, int64_t columns) {
  return is_vectorizable<T>(rows.data, columns, rows.batch, rows.seq, rows.head);
}

constexpr int64_t kMaxAutoSplits = 128;

// One launch: its plan, and the sizes of its workspace.
struct DecodeLaunch {
  DecodePlan plan;
  int64_t blocks, outputs, partial_floats;
  int shared_bytes;
};

// Plans the row tiles of `heads` heads of a request, which have p.heads / heads query heads each,
// and at most `longest` keys. Uses shapes only: lengths are on the device. Tiles have fewer rows
// where the device has less shared memory than the largest tile needs.
template <typename Keys>
DecodeLaunch plan_decode(const AttentionParams& p, int64_t heads, int64_t longest,
                         int64_t num_splits, bool stream_k) {
  using Shape = typename Keys::Shape;
  DecodeLaunch launch{};
  DecodePlan& plan = launch.plan;
  const int64_t rows = p.heads / heads * p.seqlen_q;
  const int max_bytes = shared_limit();
  int row_warps = Shape::kMinRowWarps;
  while (row_warps < Shape::kMaxRowWarps && 16 * row_warps < rows &&
         Shape::shared_bytes(Keys::kBytes, 2 * row_warps) <= max_bytes)
    row_warps *= 2;
  while (1 << plan.log2_row_warps < row_warps) ++plan.log2_row_warps;
  plan.group = static_cast<int>(p.heads / heads);
  plan.rows = static_cast<int>(rows);
  plan.tile_rows = 16 * row_warps;
  plan.row_tiles = static_cast<int>(ceil_div(rows, plan.tile_rows));
  launch.shared_bytes = Shape::shared_bytes(Keys::kBytes, row_warps);
  launch.outputs = p.batch * heads * plan.row_tiles;
  const int64_t filling = 2 * multiprocessors();
  // The capacity of a request may far exceed its length: never launch more CTAs than fill the
  // device.
  const int64_t worth = ceil_div(longest, kMinSteps<Shape> * Shape::kTileKeys);
  const int64_t maximum = worth < 1 ? 1 : worth < kMaxAutoSplits ? worth : kMaxAutoSplits;
  if (stream_k) {
    launch.blocks = launch.outputs * maximum < filling ? launch.outputs * maximum : filling;
    launch.partial_floats = 2 * launch.blocks;
  } else {
    const int64_t wanted = launch.outputs > 0 ? ceil_div(filling, launch.outputs) : 1;
    plan.splits = static_cast<int>(num_splits > 0     ? num_splits
                                   : wanted < maximum ? wanted
                                                      : maximum);
    launch.blocks = launch.outputs * plan.splits;
    // float32 keeps a second level of sums in the workspace.
    launch.partial_floats = plan.splits > 1 || Shape::kFloat ? launch.blocks : 0;
  }
  launch.partial_floats *= plan.tile_rows * int64_t{Shape::kPartialRow};
  return launch;
}

// The same without the alignment flag.
template <typename Keys>
DecodeLaunch plan_segments(const DecodeParams& d) {
  const AttentionParams& p = d.attention;
  return plan_decode<Keys>(p, p.kv_heads, d.cache.capacity, d.num_splits, d.stream_k);
}

template <typename Keys>
DecodeLaunch plan_decode(const DecodeParams& d) {
  using Cache = typename Keys::Shape::Cache;
  const AttentionParams& p = d.attention;
  DecodeLaunch launch = plan_segments<Keys>(d);
  launch.plan.aligned = has_whole_chunks<typename Keys::Element>(p.q, p.head_dim) &&
                        has_whole_chunks<Cache>(d.cache.k, p.head_dim) &&
                        has_whole_chunks<Cache>(d.cache.v, p.value_dim);
  return launch;
}

inline int64_t workspace_bytes(const DecodeLaunch& launch) {
  return 4 * (launch.partial_floats + launch.outputs);
}

// Places partial sums and counters at `workspace`, and clears the counters.
inline const char* place_partials(DecodePlan& plan, const DecodeLaunch& launch, void* workspace,
                                  cudaStream_t stream) {
  plan.partials = static_cast<float*>(workspace);
  plan.arrived = reinterpret_cast<int*>(plan.partials + launch.partial_floats);
  return set_bytes(plan.arrived, 0, launch.outputs * sizeof(int), stream);
}

// Launches kKernel(d, plan), with partial sums and counters at `workspace`.
template <auto kKernel, typename Params>
const char* launch_planned(const Params& d, DecodeLaunch planned, void* workspace,
                           cudaStream_t stream) {
  if (const char* error = place_partials(planned.plan, planned, workspace, stream)) return error;
  return launch<kKernel>(planned.blocks, kDecodeThreads, planned.shared_bytes, stream, d,
                         planned.plan);
}

// Calls visit.operator()<bucket>() with the smallest bucket that holds both head dimensions.
template <typename Visit>
auto visit_bucket(const AttentionParams& p, const Visit& visit) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return visit.template operator()<64>();
  if (dim <= 128) return visit.template operator()<128>();
  if (dim <= 256) return visit.template operator()<256>();
  return visit.template operator()<kLatentBucket>();
}

// The same for Float8 caches, with one instance for all narrow heads.
template <typename Visit>
auto visit_float8_bucket(const AttentionParams& p, const Visit& visit) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 128) return visit.template operator()<128>();
  if (dim <= 256) return visit.template operator()<256>();
  return visit.template operator()<kLatentBucket>();
}

// Compiled once for each element type (kernel*.cu).
template <typename T>
const char* launch_decode(const DecodeParams& d, cudaStream_t stream);
template <typename T>
const char* launch_float8(const DecodeParams& d, cudaStream_t stream);
// Prefills: any number of queries per request, by the attention forward with a KV cache.
// max_queries: see ForwardPlan.
template <typename T>
const char* launch_prefill(const DecodeParams& d, const MaskBounds& bounds, int max_queries,
                           cudaStream_t stream);
template <typename T>
const char* launch_prefill_float8(const DecodeParams& d, const MaskBounds& bounds,
                                  cudaStream_t stream);

}  // namespace tokenmill::cuda
