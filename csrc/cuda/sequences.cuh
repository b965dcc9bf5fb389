// Packed sequences: where they lie, and which tile of which one a block takes.
#pragma once
#include "core/dtype.h"
#include "core/rows.h"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

// Bad cu_seqlens give wrong rows but stay inside the tensors.
__device__ inline int clamped_end(const int32_t* cu_seqlens, int64_t i, int64_t tokens) {
  const int end = cu_seqlens[i];
  return end < 0 ? 0 : end > tokens ? static_cast<int>(tokens) : end;
}

// A bound on the tiles of `rows` rows in all sequences that depends on shapes alone.
inline int64_t max_tiles(const int32_t* cu_seqlens, int64_t batch, int64_t tokens, int64_t rows) {
  return cu_seqlens ? tokens / rows + batch : ceil_div(tokens, rows);
}

struct TilePlace {
  int b;     // -1: none
  int tile;  // of the sequence
};

// Tile number `index` of packed sequences, which have `least` tiles at least. All lanes of a warp
// together.
__device__ inline TilePlace find_tile(const int32_t* cu_seqlens, int64_t batch, int64_t tokens,
                                      int rows, int64_t index, int least = 0) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t first = 0; first < batch; first += kWarpSize) {
    const int64_t b = first + lane;
    int tiles = 0;
    if (b < batch) {
      const int length =
          clamped_end(cu_seqlens, b + 1, tokens) - clamped_end(cu_seqlens, b, tokens);
      tiles = length > 0 ? (length + rows - 1) / rows : least;
    }
    int64_t end = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int64_t before = __shfl_up_sync(kFullWarp, end, offset);
      if (lane >= offset) end += before;
    }
    const unsigned found = __ballot_sync(kFullWarp, index < end);
    if (found) {
      const int owner = __clz(__brev(found));  // the lowest bit
      const int tile = static_cast<int>(index - (end - tiles));
      return {static_cast<int>(first) + owner, __shfl_sync(kFullWarp, tile, owner)};
    }
    index -= __shfl_sync(kFullWarp, end, kWarpSize - 1);
  }
  return {-1, 0};
}

// Number of the first tile of sequence b. All lanes of a warp together.
__device__ inline int64_t first_tile(const int32_t* cu_seqlens, int64_t tokens, int rows, int64_t b,
                                     int least) {
  int64_t tiles = 0;
  for (int64_t i = threadIdx.x % kWarpSize; i < b; i += kWarpSize) {
    const int length = clamped_end(cu_seqlens, i + 1, tokens) - clamped_end(cu_seqlens, i, tokens);
    tiles += length > 0 ? (length + rows - 1) / rows : least;
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    tiles += __shfl_xor_sync(kFullWarp, tiles, offset);
  return tiles;
}

// Row 0 of a sequence in head h of batch b.
template <typename T>
__device__ __forceinline__ T* rows_at(const Rows& rows, int64_t b, int64_t start, int64_t h) {
  return static_cast<T*>(rows.data) + b * rows.batch + start * rows.seq + h * rows.head;
}

}  // namespace tokenmill::cuda
