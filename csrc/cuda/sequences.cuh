// Rows and tiles of packed sequences.
//
// Whatever cu_seqlens hold, each row is written by exactly one CTA: sequences share the rows from
// the first entry to the last one, clamped to the tensor, and a sequence ends at the largest entry
// so far. Rows before the first and after the last entry belong to no sequence; CTAs without a tile
// write the result of an empty row there.
#pragma once
#include <type_traits>

#include "core/dtype.h"
#include "core/rows.h"
#include "cuda/tiles.h"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

struct PackedRows {
  int start, length;

  __device__ bool contain(int64_t row) const { return row >= start && row < start + length; }
};

// An entry clamped to the tensor, for rows that are only read: sequences may overlap there.
__device__ inline int clamped_end(const int32_t* cu_seqlens, int64_t i, int64_t tokens) {
  const int end = cu_seqlens[i];
  return end < 0 ? 0 : end > tokens ? static_cast<int>(tokens) : end;
}

// Rows of all sequences.
__device__ inline PackedRows all_rows(const int32_t* cu_seqlens, int64_t batch, int64_t tokens) {
  const int start = clamped_end(cu_seqlens, 0, tokens);
  return {start, max(clamped_end(cu_seqlens, batch, tokens) - start, 0)};
}

// Rows of sequence b. Called by all lanes of a warp.
__device__ inline PackedRows rows_of_sequence(const int32_t* cu_seqlens, int64_t batch,
                                              int64_t tokens, int64_t b) {
  const PackedRows all = all_rows(cu_seqlens, batch, tokens);
  const int last = all.start + all.length;
  int start = all.start;
  for (int64_t i = threadIdx.x % kWarpSize; i <= b; i += kWarpSize)
    start = max(start, cu_seqlens[i]);
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    start = max(start, __shfl_xor_sync(kFullWarp, start, offset));
  start = min(start, last);
  return {start, max(min(cu_seqlens[b + 1], last), start) - start};
}

// Index of the first tile of sequence b, such that tiles of all sequences have distinct indices
// below tokens / rows + batch. Each sequence has at least one.
__device__ inline int first_slot(const PackedRows& sequence, int b, int rows) {
  return sequence.start / rows + b;
}

struct TilePlace {
  int b;            // -1: none
  int tile;         // tile within the sequence; b = -1: among the rows that belong to no sequence
  PackedRows rows;  // packed: rows of the sequence; b = -1: rows of all sequences
};

// Tile `index` of packed sequences. Empty sequences have `least` tiles; sequences with fewer than
// `fewest` rows have none. Called by all lanes of a warp. Number: holds the total number of tiles.
template <typename Number = int64_t>
__device__ inline TilePlace find_tile(const int32_t* cu_seqlens, int64_t batch, int64_t tokens,
                                      int rows, std::type_identity_t<Number> index, int minimum = 0,
                                      int fewest = 0) {
  const int lane = threadIdx.x % kWarpSize;
  const PackedRows all = all_rows(cu_seqlens, batch, tokens);
  const int last = all.start + all.length;
  int before = all.start;  // end of the sequence before lane 0's
  for (int64_t first = 0; first < batch; first += kWarpSize) {
    const int64_t b = first + lane;
    int row_end = min(max(b < batch ? cu_seqlens[b + 1] : 0, before), last);
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2)
      row_end = max(row_end, __shfl_up_sync(kFullWarp, row_end, offset));
    const int own_start = __shfl_up_sync(kFullWarp, row_end, 1);
    const int start = lane > 0 ? own_start : before, length = row_end - start;
    // fewest == 0 is known at compile time
    const bool counts = b < batch && (fewest == 0 || length >= fewest);
    const int tiles = !counts ? 0 : length > 0 ? (length + rows - 1) / rows : minimum;
    Number end = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const Number tiles_before = __shfl_up_sync(kFullWarp, end, offset);
      if (lane >= offset) end += tiles_before;
    }
    const unsigned found = __ballot_sync(kFullWarp, index < end);
    if (found) {
      const int owner = __clz(__brev(found));  // the lowest bit
      const int tile = static_cast<int>(index - (end - tiles));
      return {static_cast<int>(first) + owner,
              __shfl_sync(kFullWarp, tile, owner),
              {__shfl_sync(kFullWarp, start, owner), __shfl_sync(kFullWarp, length, owner)}};
    }
    index -= __shfl_sync(kFullWarp, end, kWarpSize - 1);
    before = __shfl_sync(kFullWarp, row_end, kWarpSize - 1);
  }
  return {-1, static_cast<int>(index), all};
}

// Rows that belong to no sequence, `rows` of them for each CTA without a tile.
class LooseRows {
 public:
  __device__ LooseRows(const TilePlace& none, int64_t tokens, int rows)
      : all_(none.rows),
        first_(int64_t{none.tile} * rows),
        end_(min(first_ + rows, tokens - none.rows.length)) {}

  // Fills `columns` elements of each row with `value`, one warp per row; step: elements between
  // rows.
  template <typename T>
  __device__ void fill(T* data, int64_t step, int64_t columns, float value) const {
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
#pragma unroll 1
    for (int64_t i = first_ + threadIdx.x / kWarpSize; i < end_; i += warps) {
      T* const row = data + (i < all_.start ? i : i + all_.length) * step;
#pragma unroll 1
      for (int64_t c = threadIdx.x % kWarpSize; c < columns; c += kWarpSize)
        row[c] = static_cast<T>(value);
    }
  }

 private:
  PackedRows all_;
  int64_t first_, end_;
};

// Row 0 of a sequence in head h of batch entry b.
template <typename T>
__device__ __forceinline__ T* rows_at(const Rows& rows, int64_t b, int64_t start, int64_t h) {
  return static_cast<T*>(rows.data) + b * rows.batch + start * rows.seq + h * rows.head;
}

}  // namespace tokenmill::cuda
