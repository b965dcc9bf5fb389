// Rows of listed keys and values, and where rows lie.
//
// The kernels on lists know them through a `Walk`: which rows of queries a block owns, which keys
// these see, and which queries see a tile of keys. It names rows by places, ints that are
// negative where there is no row.
#pragma once
#include "sparse/listed_stream.cuh"

namespace tokenmill::cuda {

// A place in a sequence is the position there.
__device__ __forceinline__ int64_t step_to(const Rows& rows, int place) { return place * rows.seq; }

template <typename T>
__device__ __forceinline__ T* row_at(const Rows& rows, int64_t b, int place, int64_t h) {
  return rows_at<T>(rows, b, place, h);
}

// The keys and values of a tile of queries, as stream_rows wants them.
template <typename T, typename Shape_, typename Walk, typename KeyTile, typename ValueTile>
struct KeySource {
  using Shape = Shape_;
  using KeyCopy = RowCopy<T, KeyTile>;
  using ValueCopy = RowCopy<T, ValueTile>;

  const typename Walk::Launch& d;
  const typename Walk::Keys& keys;
  int* places;  // a ring, in shared memory
  uint32_t stages;
  const T *k, *v;  // of the request and head

  __device__ int look_up(int t) const { return keys.look_up(d, t); }
  __device__ void store(int t, int place) { at(t) = place; }
  __device__ int& at(int t) const { return places[t & (Shape::kRing - 1)]; }

  __device__ __forceinline__ void load(int stage, int first) const {
    const AttentionParams& p = d.attention;
    const uint32_t tile = stages + stage * Shape::kStageBytes;
#pragma unroll 2
    for (int r = KeyCopy::first_row(); r < Shape::kTileRows; r += KeyCopy::row_step()) {
      const int place = at(first + r), row = max(place, 0);
      const bool exists = place >= 0;
      KeyCopy::copy(tile, r, k + step_to(d.k(), row), exists ? static_cast<int>(p.head_dim) : 0,
                    d.aligned);
      ValueCopy::copy(tile + Shape::kTileBytes, r, v + step_to(d.v(), row),
                      exists ? static_cast<int>(p.value_dim) : 0, d.aligned);
    }
    commit_copies();
  }
};

}  // namespace tokenmill::cuda
