// Query tile of one region and the sequence of keys it sees: the keys of listed regions, one region
// after the other.
#pragma once
#include "attention/epilogue.cuh"
#include "cuda/fast_divmod.cuh"
#include "sparse/bilevel_routing_attention/params.h"
#include "sparse/list_walk.cuh"
#include "sparse/listed_keys.cuh"

namespace tokenmill::cuda::bilevel_routing_attention {

// Rows of a map: pixel (y, x) has place y << 15 | x.
struct MapRows {
  Rows rows;
  int64_t line;
};

constexpr int kPlaceBits = 15;

__device__ __forceinline__ int64_t step_to(const MapRows& map, int place) {
  return (place >> kPlaceBits) * map.line + (place & ((1 << kPlaceBits) - 1)) * map.rows.seq;
}

template <int kCount>
__device__ __forceinline__ uint32_t chunks_to(const MapRows& map, int place) {
  const auto line = static_cast<uint32_t>(static_cast<uint64_t>(map.line) / kCount);
  return static_cast<uint32_t>(place >> kPlaceBits) * line +
         cuda::chunks_to<kCount>(map.rows, place & ((1 << kPlaceBits) - 1));
}

template <int kCount>
__device__ __forceinline__ uint32_t head_chunks_to(const MapRows& map, int head) {
  return cuda::head_chunks_to<kCount>(map.rows, head);
}

template <typename T>
__device__ __forceinline__ T* row_at(const MapRows& map, int64_t b, int place, int64_t h) {
  return rows_at<T>(map.rows, b, 0, h) + step_to(map, place);
}

// Regions of a map, with FastDivmod divisors.
struct RegionMap {
  static constexpr int kNowhere = -1;

  RegionGrid grid;
  int regions;
  int slot;  // pixels of the largest region
  FastDivmod columns, width,
      last_width;  // regions per row; pixels per line of a region, of the last region in a row

  static RegionMap of(const RegionGrid& grid) {
    const Region first = grid.region(0), last = grid.region(grid.columns() - 1);
    return {grid,
            grid.regions(),
            first.pixels(),
            FastDivmod::of(grid.columns()),
            FastDivmod::of(first.width),
            FastDivmod::of(last.width)};
  }

  __device__ Region region(int id) const {
    const int row = columns.divide(id), column = id - row * columns.value;
    const int y = row * grid.region_height, x = column * grid.region_width;
    return {y, x, min(grid.region_height, grid.height - y), min(grid.region_width, grid.width - x)};
  }

  // Place of pixel i < slot of a region; kNowhere past the end of a smaller region.
  __device__ __forceinline__ int place(int id, int i) const {
    const int row = columns.divide(id), column = id - row * columns.value;
    const FastDivmod& line = column == columns.value - 1 ? last_width : width;
    const int down = line.divide(i), y = row * grid.region_height + down;
    if (down >= grid.region_height || y >= grid.height) return kNowhere;
    return y << kPlaceBits | (column * grid.region_width + i - down * line.value);
  }

  // Row of the flattened map.
  __device__ int row(int place) const {
    return (place >> kPlaceBits) * grid.width + (place & ((1 << kPlaceBits) - 1));
  }
};

// Launch parameters added by the host.
struct RegionLaunch : BilevelParams {
  RegionMap query_map, key_map;
  FastDivmod together, key_slot;  // heads that share a list and keys; key_map.slot
  int row_warps;                  // warps along the rows of a CTA
  int tile_rows;                  // rows of a CTA
  int tiles;                      // tiles of a region
  bool aligned;                   // rows of the inputs are whole 16-byte chunks
  bool aligned_out;               // rows of the output are whole 16-byte chunks
  bool compact;                   // all keys and values lie within 2^32 chunks, and are aligned
  float factor;                   // scale of products, in log2 units

  __device__ MapRows q() const { return {attention.q, q_line}; }
  __device__ MapRows k() const { return {attention.k, k_line}; }
  __device__ MapRows v() const { return {attention.v, v_line}; }
};

// Rows of a tile: queries of one region times the heads that share their keys. Row r is pixel
// r / together of head r % together.
struct RegionQueries {
  const RegionLaunch& d;
  int b, head, region;
  int first, rows;  // within the rows of the region

  __device__ static RegionQueries of(const RegionLaunch& d) {
    const int heads = d.together.divide(static_cast<int>(d.attention.heads));
    const unsigned index = block_index();
    const int tile = index % d.tiles, regions = d.query_map.regions;
    const unsigned head_region = index / d.tiles, b_head = head_region / regions;
    RegionQueries q{d, static_cast<int>(b_head / heads),
                    static_cast<int>(b_head % heads) * d.together.value,
                    static_cast<int>(head_region % regions)};
    q.first = tile * d.tile_rows;
    q.rows = min(d.tile_rows, d.query_map.region(q.region).pixels() * d.together.value - q.first);
    return q;
  }

  template <typename T>
  __device__ T* first_key(const MapRows& rows, int64_t kv_head) const {
    return row_at<T>(rows, b, 0, kv_head);
  }
  __device__ int place(int r) const {
    return d.query_map.place(region, d.together.divide(first + r));
  }
  __device__ int query(int r) const { return d.query_map.row(place(r)); }
  __device__ int head_of(int r) const {
    const int row = first + r;
    return head + row - d.together.divide(row) * d.together.value;
  }
  __device__ static int position(int) { return 0; }  // all queries see the same keys
};

// Kept in shared memory to save registers. Key t belongs to entry first + t / slot of the list.
struct RegionKeys {
  const int32_t* list;
  int first, total;  // first valid entry; keys of all entries up to the last valid one
  bool all_count;
  float pads;  // log of the number of padding keys of regions; -inf: none

  // Called by all threads of the CTA; `shared` has room for one RegionKeys.
  __device__ static void find(const RegionLaunch& d, const RegionQueries& q, RegionKeys* shared,
                              int*) {
    if (threadIdx.x < kWarpSize) {
      const int64_t h = d.list_head(q.head);
      const int32_t* list = d.list.at(q.b, h, q.region);
      const int count = static_cast<int>(d.list.count(q.b, h, q.region));
      const int lane = threadIdx.x, whole = d.keys.pixels();
      WarpListWalk walk{d.key_map.regions};
      int first = 0, end = 0, counted = 0;
      float pads = 0;
      for (int e = 0; e < count; e += kWarpSize) {
        const int id = e + lane < count ? list[e + lane] : -1;
        const bool counts = walk.counts(id);
        const unsigned all = __ballot_sync(kFullWarp, counts);
        if (counts) pads += static_cast<float>(whole - d.key_map.region(id).pixels());
        if (!all) continue;
        if (!counted) first = e + __ffs(all) - 1;
        end = e + kWarpSize - __clz(all);
        counted += __popc(all);
      }
      pads = d.pads_count ? warp_sum(pads) : 0;
      if (lane == 0)
        *shared = {list, first, (end - first) * d.key_map.slot, counted == end - first, logf(pads)};
    }
    __syncthreads();
  }

  // Address of the list id of key t, or null.
  __device__ __forceinline__ const int32_t* id_at(const RegionLaunch& d, int t) const {
    return t < total ? list + first + d.key_slot.divide(t) : nullptr;
  }

  // Place of key t, or kNowhere.
  __device__ __forceinline__ int place(const RegionLaunch& d, int t, int id) const {
    if (t >= total) return RegionMap::kNowhere;
    const int n = d.key_slot.divide(t);
    if (!all_count) {  // an id counts if it is a region index and greater than all previous ids
      if (id < 0 || id >= d.key_map.regions) return RegionMap::kNowhere;
      for (int e = first + n - 1; e >= first; --e)
        if (list[e] >= id) return RegionMap::kNowhere;
    }
    return d.key_map.place(id, t - n * d.key_slot.value);
  }

  static __device__ __forceinline__ RegionQueries queries_again(const RegionLaunch& d,
                                                                const RegionKeys&) {
    return RegionQueries::of(d);
  }
  static __device__ __forceinline__ int row_of(const RegionLaunch&, int place) { return place; }
  // A key is visible to all queries or to none.
  __device__ __forceinline__ static Seeing seen_by(const RegionLaunch&, int, int place) {
    return {place < 0 ? Seeing::kMasked : -Seeing::kUnbounded, Seeing::kUnbounded};
  }

  // Output scale and lse of a row whose weights sum to `sum` relative to 2^row_max.
  __device__ __forceinline__ RowScale epilogue(const RegionLaunch&, int, float sum,
                                               float row_max) const {
    return softmax_epilogue(sum, row_max, pads > -infinity() ? &pads : nullptr, 0);
  }
};

struct RegionWalk {
  using Launch = RegionLaunch;
  using Queries = RegionQueries;
  using Keys = RegionKeys;
};

}  // namespace tokenmill::cuda::bilevel_routing_attention
