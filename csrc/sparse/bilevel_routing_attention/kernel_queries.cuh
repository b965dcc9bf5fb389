// Key tile of one region, and the queries of the regions that list it, found through the transposed
// lists.
#pragma once
#include "sparse/bilevel_routing_attention/kernel_keys.cuh"

namespace tokenmill::cuda::bilevel_routing_attention {

// Launch parameters of the backward.
struct RegionGradients : RegionLaunch {
  Rows dout, dq, dk, dv;
  int64_t dout_line;
  const float* dlse;
  float *minus_lse, *minus_delta;    // layout of lse
  const int32_t *offsets, *listing;  // output of transpose_block_list
  bool compact_queries;              // `compact` for Q and dO, which stream past a key tile
  FastDivmod query_rows;             // rows of the largest region, over the heads that share a list

  __device__ MapRows of_dout() const { return {dout, dout_line}; }
  __device__ MapRows out() const { return {attention.out, out_line}; }
  __device__ int query_at(int place) const { return query_map.row(place); }
};

// Keys of one region that a CTA owns.
struct RegionKeyTile {
  const RegionGradients& d;
  int b, kv_head, region;
  int first, rows, seen;  // within the pixels of the region; seen: all of them

  __device__ static RegionKeyTile of(const RegionGradients& d) {
    const int tile = blockIdx.x % d.tiles, regions = d.key_map.regions;
    const int kv_heads = static_cast<int>(d.attention.kv_heads);
    const unsigned head_region = blockIdx.x / d.tiles, b_head = head_region / regions;
    const int region = static_cast<int>(head_region % regions);
    const int first = tile * d.tile_rows;
    const int rows = min(d.tile_rows, d.key_map.region(region).pixels() - first);
    return {d,
            static_cast<int>(b_head / kv_heads),
            static_cast<int>(b_head % kv_heads),
            region,
            first,
            rows,
            rows};
  }

  __device__ bool exists() const { return rows > 0; }
  __device__ int place(int r) const { return d.key_map.place(region, first + r); }
  __device__ int key(int r) const { return d.key_map.row(place(r)); }
};

// Mask of a warp's keys: visible to every existing query.
struct RegionWarpKeys {
  __device__ RegionWarpKeys(const RegionLaunch&, const RegionKeyTile&, int) {}

  __device__ static bool any_seen(int query) { return query >= 0; }
  // Absent queries are rows of zeros, which add nothing.
  __device__ static constexpr bool all_seen(int) { return true; }
  __device__ static constexpr bool sees(int, int) { return true; }
};

// Queries of the regions that list a key region.
class RegionListing {
 public:
  // query: place, or kNowhere; head: index among the heads that share its list.
  struct Place {
    int query, head;
  };
  struct Window {};

  __device__ RegionListing(const RegionGradients& d, Window&, const RegionKeyTile& tile)
      : d_(d), b_(tile.b), kv_head_(tile.kv_head), region_(tile.region) {}

  // Visits the lists of the heads in the group one after the other. Called by all threads of the
  // CTA.
  template <typename Visit>
  __device__ __forceinline__ void each_window(const Visit& visit) {
    const int group = static_cast<int>(d_.attention.heads / d_.attention.kv_heads);
#pragma unroll 1
    for (int head = 0; head < group; head += d_.together.value) {
      head_ = kv_head_ * group + head;
      const int64_t h = b_ * d_.list.heads + d_.list_head(head_);
      const int32_t* offsets = d_.offsets + h * (d_.key_map.regions + 1) + region_;
      listing_ = d_.listing + h * d_.list.rows * d_.list.entries + offsets[0];
      total_ = (offsets[1] - offsets[0]) * d_.query_rows.value;
      visit();
    }
  }

  __device__ int total() const { return total_; }

  __device__ __forceinline__ const int32_t* id_at(int t) const {
    return t < total_ ? listing_ + d_.query_rows.divide(t) : nullptr;
  }

  __device__ __forceinline__ Place look_up(int t, int region) const {
    if (t >= total_) return {RegionMap::kNowhere, 0};
    const int row = t - d_.query_rows.divide(t) * d_.query_rows.value;
    const int pixel = d_.together.divide(row);
    return {d_.query_map.place(region, pixel), row - pixel * d_.together.value};
  }

  __device__ __forceinline__ static int column(const Place& place, const RegionWarpKeys&) {
    return place.query;
  }

 protected:
  const RegionGradients& d_;
  int b_;
  int head_ = 0;  // first head of the current list

 private:
  int kv_head_, region_;
  const int32_t* listing_ = nullptr;
  int total_ = 0;
};

struct RegionGradientWalk : RegionWalk {
  using Gradients = RegionGradients;
  using KeyTile = RegionKeyTile;
  using WarpKeys = RegionWarpKeys;
  template <typename, int>
  using Listing = RegionListing;
};

}  // namespace tokenmill::cuda::bilevel_routing_attention
