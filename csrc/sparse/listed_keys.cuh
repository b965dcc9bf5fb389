// Streaming of listed key and value rows, and row addressing.
//
// The kernels are generic over a `Walk`: the query rows that a CTA owns, the keys that they see,
// and the queries that see a key tile. Rows are identified by places: ints, negative if there is no
// row.
#pragma once
#include "sparse/listed_stream.cuh"

namespace tokenmill::cuda {

// In a sequence, a place is a position.
__device__ __forceinline__ int64_t step_to(const Rows& rows, int place) { return place * rows.seq; }

// Offset in chunks of kCount elements, modulo 2^32.
template <int kCount>
__device__ __forceinline__ uint32_t chunks_to(const Rows& rows, int place) {
  return static_cast<uint32_t>(place) *
         static_cast<uint32_t>(static_cast<uint64_t>(rows.seq) / kCount);
}

// Chunks between heads.
template <int kCount>
__device__ __forceinline__ uint32_t head_chunks_to(const Rows& rows, int head) {
  return static_cast<uint32_t>(head) *
         static_cast<uint32_t>(static_cast<uint64_t>(rows.head) / kCount);
}

template <typename T>
__device__ __forceinline__ T* row_at(const Rows& rows, int64_t b, int place, int64_t h) {
  return rows_at<T>(rows, b, place, h);
}

// A key is seen by queries at positions begin .. end - 1.
struct Seeing {
  static constexpr int kMasked = 0x7fffffff;  // begin of a key that does not exist
  // larger than any position, and than any sum of two positions
  static constexpr int kUnbounded = 0x3fffffff;

  int begin, end;

  __device__ __forceinline__ bool by(int position) const {
    return position >= begin && position < end;
  }
  // True if all (any) of the queries at positions first ... last see the key.
  __device__ __forceinline__ bool by_all(int first, int last) const {
    return begin <= first && end > last;
  }
  __device__ __forceinline__ bool by_any(int first, int last) const {
    return begin <= last && end > first;
  }
};

// Metadata in shared memory of streamed rows of two tensors (K and V, or Q and dO): addresses for
// two tiles, one being loaded and one being looked up, and query ranges also for the tile being
// computed.
template <int kTileRows>
struct RowRing {
  static constexpr int kRows = kTileRows;
  static constexpr int kGroup = kTileRows < kWarpSize ? kTileRows : kWarpSize;
  static constexpr int kGroups = kTileRows / kGroup;  // per tile

  // Offset in chunks from the first row of each tensor if the launch is compact, else a place.
  struct alignas(8) Row {
    uint32_t x, y;
  };

  FetchedIds<kTileRows> fetched;
  Row rows[2 * kTileRows];
  Seeing seen[4 * kTileRows];
  Seeing seen_group[4][kGroups];  // intersection over each group

  __device__ __forceinline__ Row& row(unsigned t) { return rows[t % (2 * kTileRows)]; }
  __device__ __forceinline__ const Row& row(unsigned t) const { return rows[t % (2 * kTileRows)]; }
  __device__ __forceinline__ const Seeing& seen_by(unsigned t) const {
    return seen[t % (4 * kTileRows)];
  }

  // One group of the tile that starts with row t; the lanes of a warp cover all groups.
  __device__ __forceinline__ const Seeing& own_group(unsigned t) const {
    return seen_group[t / kTileRows % 4][threadIdx.x % kGroups];
  }
  // True if all keys of the tile exist. Called by all lanes of a warp.
  __device__ __forceinline__ bool is_full(unsigned t) const {
    return __all_sync(kFullWarp, own_group(t).begin != Seeing::kMasked);
  }
  // True if all queries see all keys of the tile: `position` is the first query's in one half of
  // each warp's lanes and the last query's in the other.
  __device__ __forceinline__ bool seen_by_all(unsigned t, int position) const {
    return __all_sync(kFullWarp, own_group(t).by(position));
  }

  // Stores the metadata of key t. Called by the threads of a group together.
  __device__ __forceinline__ void store(unsigned t, const Row& at, const Seeing& by) {
    row(t) = at;
    seen[t % (4 * kTileRows)] = by;
    constexpr unsigned kLanes = kGroup == kWarpSize ? kFullWarp : (1u << kGroup % kWarpSize) - 1;
    const int begin = __reduce_max_sync(kLanes, by.begin);
    const int end = __reduce_min_sync(kLanes, by.end);
    if (threadIdx.x % kWarpSize == 0)
      seen_group[t / kTileRows % 4][t % kTileRows / kGroup] = {begin, end};
  }
};

// Key metadata of the query-side kernels, at the start of shared memory.
template <typename T, typename Keys_, int kTileRows>
struct alignas(128) KeyTable {
  using Keys = Keys_;

  RowRing<kTileRows> ring;
  const T *k, *v;  // first rows of the request and head
  Keys keys;
  int rows;         // query rows
  int counters[2];  // for Keys::find
};

// Fills the table for the keys that the queries see. Called by all threads of the CTA.
template <typename Walk, typename Table>
__device__ __forceinline__ void find_keys(const typename Walk::Launch& d,
                                          const typename Walk::Queries& q, Table& table) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(Table::k)>>;
  if (threadIdx.x == 0) {
    const int64_t kv_head = d.kv_head(q.head);
    table.k = q.template first_key<const T>(d.k(), kv_head);
    table.v = q.template first_key<const T>(d.v(), kv_head);
    table.rows = q.rows;
  }
  Table::Keys::find(d, q, &table.keys, table.counters);
}

// Copies the tile of two tensors that starts with row `first` of a ring. All rows must exist;
// offsets are in chunks from x and y.
template <typename XTile, typename YTile, typename T, typename Ring>
__device__ __forceinline__ void copy_full_tile(uint32_t tile, const Ring& ring, int first,
                                               const T* x, int64_t x_columns, const T* y,
                                               int64_t y_columns) {
  using CopyX = ChunkCopy<T, XTile>;
  using CopyY = ChunkCopy<T, YTile>;
  constexpr int kTileBytes = Ring::kRows * XTile::kRowBytes;
  constexpr bool kAlike = std::is_same_v<XTile, YTile>;
  const CopyX copy_x(x, static_cast<int>(x_columns));
  const CopyY copy_y(y, static_cast<int>(y_columns));
  int r = threadIdx.x / CopyX::kLanes;
  r += r / CopyX::kRows * (8 - CopyX::kRows);  // a warp owns 8 rows
  const int step = blockDim.x / kWarpSize * 8;
  const auto* row = &ring.row(first) + r;
  uint32_t to_x = tile + CopyX::own(), to_y = tile + CopyY::own();
#pragma unroll 1
  for (; r < Ring::kRows; r += step) {
    unroll<8 / CopyX::kRows>([&](auto i) {
      constexpr int kRow = i * CopyX::kRows;
      const auto at = row[kRow];
      copy_x.template copy<kRow, 0>(to_x, at.x);
      copy_y.template copy<kRow, kTileBytes>(kAlike ? to_x : to_y, at.y);
    });
    row += step;
    to_x += step * XTile::kRowBytes;
    to_y += step * YTile::kRowBytes;
  }
}

// Row source for stream_rows: the keys and values of a query tile.
template <typename T, typename Shape_, typename Walk, typename KeyTile, typename ValueTile>
struct KeySource {
  using Shape = Shape_;
  using Table = KeyTable<T, typename Walk::Keys, Shape::kTileRows>;
  static constexpr int kCount = kChunkBytes / sizeof(T);

  const typename Walk::Launch& d;
  Table& table;
  uint32_t stages;

  __device__ __forceinline__ int total() const { return table.keys.total; }
  __device__ __forceinline__ void fetch(int t) {
    if (const int32_t* id = table.keys.id_at(d, t)) table.ring.fetched.fetch(t, id);
  }

  __device__ __forceinline__ void store(int t) {
    const int place = table.keys.place(d, t, table.ring.fetched.at(t));
    const int row = table.keys.row_of(d, max(place, 0));
    typename decltype(table.ring)::Row at{static_cast<uint32_t>(row), 0};
    if (d.compact) at = {chunks_to<kCount>(d.k(), row), chunks_to<kCount>(d.v(), row)};
    table.ring.store(t, at, table.keys.seen_by(d, t, place));
  }

  __device__ __forceinline__ void load(int stage, int first) const {
    const uint32_t tile = stages + stage * Shape::kStageBytes;
    if (d.compact && table.ring.is_full(first))
      copy_full_tile<KeyTile, ValueTile>(tile, table.ring, first, table.k, d.attention.head_dim,
                                         table.v, d.attention.value_dim);
    else
      load_rows(tile, first);
    cp_async_commit();
  }

 private:
  // Slow path: keys may not exist, and rows may lie anywhere.
  __device__ __forceinline__ void load_rows(uint32_t tile, int first) const {
    using KeyCopy = RowCopy<T, KeyTile>;
    using ValueCopy = RowCopy<T, ValueTile>;
    const AttentionParams& p = d.attention;
#pragma unroll 1
    for (int r = KeyCopy::first_row(); r < Shape::kTileRows; r += KeyCopy::row_step()) {
      const auto at = table.ring.row(first + r);
      const int row = static_cast<int>(at.x);
      const T* key = table.k + (d.compact ? int64_t{at.x} * kCount : step_to(d.k(), row));
      const T* value = table.v + (d.compact ? int64_t{at.y} * kCount : step_to(d.v(), row));
      const bool exists = table.ring.seen_by(first + r).begin != Seeing::kMasked;
      KeyCopy::copy_to(tile, r, key, exists ? static_cast<int>(p.head_dim) : 0, d.aligned);
      ValueCopy::copy_to(tile + Shape::kTileBytes, r, value,
                         exists ? static_cast<int>(p.value_dim) : 0, d.aligned);
    }
  }
};

}  // namespace tokenmill::cuda
