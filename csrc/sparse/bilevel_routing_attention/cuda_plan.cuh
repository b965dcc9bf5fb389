// Grid of a call, forward and backward, and its launch.
#pragma once
#include "cuda/refuse.cuh"
#include "sparse/bilevel_routing_attention/kernel_queries.cuh"
#include "sparse/listed_plan.cuh"

namespace tokenmill::cuda::bilevel_routing_attention {

// Cuts `rows` rows into the minimum number of equal tiles of at most `most` warps of `warp_rows`
// rows; one tile if there are no rows.
template <typename Launch>
void cut_rows(Launch& d, int64_t rows, int warp_rows, int minimum, int maximum) {
  d.tiles = rows > 0 ? static_cast<int>(ceil_div(rows, int64_t{warp_rows} * maximum)) : 1;
  d.row_warps = static_cast<int>(ceil_div(rows, int64_t{warp_rows} * d.tiles));
  if (d.row_warps < minimum) d.row_warps = minimum;
  d.tile_rows = warp_rows * d.row_warps;
}

// Maps must have at least one pixel.
inline RegionLaunch plan_regions(const BilevelParams& d) {
  RegionLaunch launch{d, RegionMap::of(d.queries), RegionMap::of(d.keys)};
  launch.together = FastDivmod::of(static_cast<int>(d.heads_together()));
  launch.key_slot = FastDivmod::of(launch.key_map.slot);
  launch.factor = d.attention.scale * kLog2e;
  return launch;
}

// Requires `aligned` to be set.
template <typename T>
bool has_compact_keys(const RegionLaunch& d) {
  const AttentionParams& p = d.attention;
  const auto end = [&](const Rows& rows, int64_t line) {
    return d.keys.height * line + d.keys.width * rows.seq;
  };
  return d.aligned && is_compact<T>(end(p.k, d.k_line)) && is_compact<T>(end(p.v, d.v_line));
}

inline int64_t query_rows(const RegionLaunch& d) {
  return int64_t{d.query_map.slot} * d.together.value;
}

inline int64_t query_tiles(const RegionLaunch& d) {
  const AttentionParams& p = d.attention;
  return p.batch * (p.heads / d.together.value) * d.query_map.regions * d.tiles;
}

inline const char* check_sizes(const BilevelParams& d) {
  // pixels, if all regions were as large as the first one
  const auto whole = [](const RegionGrid& grid) {
    return int64_t{grid.regions()} * grid.region(0).pixels();
  };
  const int64_t queries = whole(d.queries) * d.heads_together(), keys = whole(d.keys);
  if (queries > kMaxLength)
    return refuse("q", "must have at most 2^29 queries for the heads that share a list on CUDA",
                  queries);
  if (keys > kMaxLength) return refuse("k", "must have at most 2^29 keys on CUDA", keys);
  const int64_t listed = d.list.entries * d.keys.region(0).pixels();
  if (listed > kMaxLength)
    return refuse("indices", "must list at most 2^29 keys of a region on CUDA", listed);
  return nullptr;
}

// Compiled once for each element type (kernel*.cu).
template <typename T>
const char* launch_bilevel(const RegionLaunch& d, cudaStream_t stream);
template <typename T>
const char* launch_bilevel(const RegionGradients& d, cudaStream_t stream);

}  // namespace tokenmill::cuda::bilevel_routing_attention
