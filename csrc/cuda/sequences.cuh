// Packed sequences: where they lie, and which tile of which one a block takes.
//
// Whatever cu_seqlens say, each row that a kernel writes has one block: sequences share the rows
// from the first entry to the last one, which lie in the tensor, and a sequence ends at the largest
// entry so far. The rows in front of them and behind them belong to no sequence; blocks without a
// tile write there what an empty row gets.
#pragma once
#include <type_traits>

#include "core/dtype.h"
#include "core/rows.h"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

struct PackedRows {
  int start, length;

  __device__ bool contain(int64_t row) const { return row >= start && row < start + length; }
};

// An entry as rows that are only read take it: those of two sequences may overlap.
__device__ inline int clamped_end(const int32_t* cu_seqlens, int64_t i, int64_t tokens) {
  const int end = cu_seqlens[i];
  return end < 0 ? 0 : end > tokens ? static_cast<int>(tokens) : end;
}

// Those of all sequences.
__device__ inline PackedRows all_rows(const int32_t* cu_seqlens, int64_t batch, int64_t tokens) {
  const int start = clamped_end(cu_seqlens, 0, tokens);
  return {start, max(clamped_end(cu_seqlens, batch, tokens) - start, 0)};
}

// Those of sequence b. All lanes of a warp together.
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

// A bound on the tiles of `rows` rows in all sequences and in the rows without one, that depends on
// shapes alone. Packed: sequences with fewer than `fewest` rows have none.
inline int64_t max_tiles(const int32_t* cu_seqlens, int64_t batch, int64_t tokens, int64_t rows,
                         int64_t fewest = 0) {
  if (!cu_seqlens) return ceil_div(tokens, rows);
  return tokens / rows + (fewest > 1 && tokens / fewest < batch ? tokens / fewest : batch) + 1;
}

// A number for tile 0 of sequence b, from which on its tiles have numbers of their own, at most
// tokens / rows + batch in all. Each sequence has one at least.
__device__ inline int first_slot(const PackedRows& sequence, int b, int rows) {
  return sequence.start / rows + b;
}

struct TilePlace {
  int b;            // -1: none
  int tile;         // of the sequence; without one, of the rows that no sequence has
  PackedRows rows;  // packed: of the sequence; without one, of all sequences
};

// Tile number `index` of packed sequences, which have `least` tiles at least; those with fewer than
// `fewest` rows have none. All lanes of a warp together. Number: holds the number of all tiles.
template <typename Number = int64_t>
__device__ inline TilePlace find_tile(const int32_t* cu_seqlens, int64_t batch, int64_t tokens,
                                      int rows, std::type_identity_t<Number> index, int least = 0,
                                      int fewest = 0) {
  const int lane = threadIdx.x % kWarpSize;
  const PackedRows all = all_rows(cu_seqlens, batch, tokens);
  const int last = all.start + all.length;
  int before = all.start;  // where the sequence in front of lane 0's ends
  for (int64_t first = 0; first < batch; first += kWarpSize) {
    const int64_t b = first + lane;
    int row_end = min(max(b < batch ? cu_seqlens[b + 1] : 0, before), last);
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2)
      row_end = max(row_end, __shfl_up_sync(kFullWarp, row_end, offset));
    const int own_start = __shfl_up_sync(kFullWarp, row_end, 1);
    const int start = lane > 0 ? own_start : before, length = row_end - start;
    // fewest == 0: known when compiled
    const bool counts = b < batch && (fewest == 0 || length >= fewest);
    const int tiles = !counts ? 0 : length > 0 ? (length + rows - 1) / rows : least;
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

// The share of a block without a tile, `rows` rows, in those that no sequence has.
class LooseRows {
 public:
  __device__ LooseRows(const TilePlace& none, int64_t tokens, int rows)
      : all_(none.rows),
        first_(int64_t{none.tile} * rows),
        end_(min(first_ + rows, tokens - none.rows.length)) {}

  // Sets `columns` elements of each row; step: elements from a row to the next one. A warp a row.
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

// Row 0 of a sequence in head h of batch b.
template <typename T>
__device__ __forceinline__ T* rows_at(const Rows& rows, int64_t b, int64_t start, int64_t h) {
  return static_cast<T*>(rows.data) + b * rows.batch + start * rows.seq + h * rows.head;
}

}  // namespace tokenmill::cuda
