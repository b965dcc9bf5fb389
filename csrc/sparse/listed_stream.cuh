// Rows of two tensors, from wherever they lie, through two stages of shared memory. Where those of
// a tile lie is looked up two tiles ahead.
#pragma once
#include "cuda/load_tile.cuh"
#include "dense/attention/kernel_terms.cuh"

namespace tokenmill::cuda {

// Sizes of what streams: kTileRows rows of both tensors a stage.
template <typename T, int kBucket>
struct StreamShape {
  static constexpr int kRowBytes = kBucket * static_cast<int>(sizeof(T));
  static constexpr int kTileRows = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16;
  // Places of four tiles: one is worked on, one is loaded, one is looked up.
  static constexpr int kRing = 4 * kTileRows;
  static constexpr int kTileBytes = kTileRows * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;
};

// This thread's chunks of one row after the other.
template <typename T, typename Tile>
struct RowCopy {
  static constexpr int kCount = kChunkBytes / sizeof(T);
  static constexpr int kLanes = Tile::kChunks % 16 == 0 ? 16 : 8;  // threads side by side in a row
  static_assert(Tile::kChunks % 8 == 0);

  static __device__ int first_row() { return threadIdx.x / kLanes; }
  static __device__ int row_step() { return blockDim.x / kLanes; }

  // `columns` elements of a row to row r of the tile, zeros behind them.
  static __device__ __forceinline__ void copy(uint32_t tile, int r, const T* row, int columns,
                                              bool aligned) {
    const int lane = threadIdx.x % kLanes, own = lane * kCount;
    const uint32_t to = tile + Tile::offset(r, lane);
#pragma unroll
    for (int c = 0; c < Tile::kChunks; c += kLanes) {
      const int left = columns - own - c * kCount;
      const T* from = row + (left > 0 ? own + c * kCount : 0);
      if (aligned)
        copy_async_or_zero(to + c * kChunkBytes, from, left > 0);
      else
        copy_elements(to + c * kChunkBytes, from, left);
    }
  }
};

// Rows begin, begin + 1, ... of those that `source` knows: look_up(t) is the place of number t,
// store(t, place) keeps it in shared memory, load(stage, t) copies the tile whose places begin with
// that of t and commits the copies. work(stage, t) follows for each tile. All threads together; in
// the end nothing is under way and nobody reads a stage.
template <int kTileRows, typename Place, typename Source, typename Work>
__device__ __forceinline__ void stream_rows(Source& source, int total, const Work& work) {
  if (total <= 0) {
    wait_for_copies<0>();
    __syncthreads();
    return;
  }
  const int threads = blockDim.x, own = threadIdx.x;
  constexpr int kMost = kTileRows / kWarpSize < 1 ? 1 : kTileRows / kWarpSize;
  for (int t = own; t < 2 * kTileRows; t += threads) source.store(t, source.look_up(t));
  __syncthreads();
  source.load(0, 0);
  int stage = 0;
#pragma unroll 1
  for (int first = 0; first < total; first += kTileRows, stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();
    const int next = first + kTileRows, second = next + kTileRows;
    if (next < total) source.load(stage ^ 1, next);
    Place ahead[kMost];  // on their way while the tile is worked on
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (second < total && own + i * threads < kTileRows)
        ahead[i] = source.look_up(second + own + i * threads);
    work(stage, first);
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (second < total && own + i * threads < kTileRows)
        source.store(second + own + i * threads, ahead[i]);
  }
  __syncthreads();
}

}  // namespace tokenmill::cuda
