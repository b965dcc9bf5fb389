// Products on tensor cores, reduced to the maximum per row in registers. A CTA has some rows of a
// and iterates over all rows of b, one tile of product columns at a time; slices of both operands
// pass through a ring of shared memory buffers.
#pragma once
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/load_tile.cuh"
#include "cuda/math.cuh"
#include "cuda/warp.cuh"
#include "tokens/best_match/params.h"

namespace tokenmill::cuda::best_match {

constexpr int kMatchWarps = 4;
constexpr int kMatchThreads = kMatchWarps * kWarpSize;
constexpr int kMatchColumns = 64;   // rows of b per tile
constexpr int kMatchStages = 3;     // slices of b in shared memory
constexpr int kResidentSlices = 4;  // up to this many slices, all of a stays in shared memory
constexpr int kSliceRowBytes = 128;

// kRowTiles times 16 rows of a per warp.
template <int kRowTiles>
struct MatchShape {
  static constexpr int kRows = kMatchWarps * 16 * kRowTiles;
  static constexpr int kBytesA = kRows * kSliceRowBytes;
  static constexpr int kBytesB = kMatchColumns * kSliceRowBytes;

  static int shared_bytes(int slices) {
    const int kept = slices <= kResidentSlices ? slices : kMatchStages;
    return kept * kBytesA + kMatchStages * kBytesB;
  }
};

struct MatchPlan {
  int row_tiles, slices;
  bool aligned_a, aligned_b;
  const float *factors_a, *factors_b;  // [B, rows], [B, partners]; null: 1
};

// 16 bytes read by a lane from a row serve two products (mma_sm80.cuh): chunks 4 j .. 4 j + 3 of
// two adjacent rows at once.
using MatchTile = SharedTile<kSliceRowBytes, Swizzle::quad>;

// Loads slice `slice` of rows first .. first + kRows - 1, zero-filled past the last row.
template <typename T, int kRows>
__device__ __forceinline__ void load_slice(uint32_t tile, const GlobalRows<T>& from, int first,
                                           int slice) {
  constexpr int kCount = kChunkBytes / sizeof(T), kLanes = MatchTile::kChunks;
  constexpr int kStep = kMatchThreads / kLanes;
  const int chunk = threadIdx.x % kLanes, own = threadIdx.x / kLanes;
  const int column = (slice * kLanes + chunk) * kCount;
  const T* next = from.data + (first + own) * from.stride + column;
  const int64_t step = kStep * from.stride;
  const uint32_t to = tile + MatchTile::offset(own, chunk);
  static_assert(kStep % 8 == 0);
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const int columns = first + own + i * kStep < from.rows ? from.columns - column : 0;
    const uint32_t at = to + i * kStep * kSliceRowBytes;
    if (from.aligned)
      cp_async_zfill(at, next, columns > 0);
    else
      copy_elements(at, next, columns);
    next += step;
  }
}

template <typename T, int kRowTiles>
__device__ __forceinline__ void multiply_slice(float (&s)[kRowTiles][kMatchColumns / 8][4],
                                               uint32_t tile_a, uint32_t tile_b) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t own = MatchTile::offset(lane / 4, lane % 4);
  const uint32_t rows = tile_a + warp * 16 * kRowTiles * kSliceRowBytes;
#pragma unroll
  for (int j = 0; j < kSliceRowBytes / 64; ++j) {
    const uint32_t at = own ^ (64 * j);
    Fragment<T, 4> a[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      uint32_t low[4], high[4];
      load_shared(low, rows + at + 16 * m * kSliceRowBytes);
      load_shared(high, rows + at + (16 * m + 8) * kSliceRowBytes);
#pragma unroll
      for (int u = 0; u < 2; ++u)
        a[m][u] = make_fragment<T>(low[2 * u], high[2 * u], low[2 * u + 1], high[2 * u + 1]);
    }
#pragma unroll
    for (int n = 0; n < kMatchColumns / 8; ++n) {
      uint32_t w[4];
      load_shared(w, tile_b + at + 8 * n * kSliceRowBytes);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const auto b = make_fragment<T>(w[2 * u], w[2 * u + 1]);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) mma(s[m][n], a[m][u], b);
      }
    }
  }
}

struct BestProduct {
  float score;
  int index;

  // Columns arrive in ascending order: among equal products the first stays.
  __device__ __forceinline__ void add(float product, int column) {
    const bool greater = product > score;
    score = greater ? product : score;
    index = greater ? column : index;
  }
  // Multiplies by the factor of the row of a, which changes the order of products only if it is 0.
  __device__ __forceinline__ void scale(float factor, const float* factors_b, int partners) {
    if (factor != factor) *this = {-infinity(), 0};
    if (score == -infinity()) return;
    score *= factor;
    if (factor == 0)
      for (index = 0; index < partners - 1 && factors_b[index] != factors_b[index];) ++index;
  }
  // Maximum over the lanes of a quad, which share a row.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      const float other = __shfl_xor_sync(kFullWarp, score, offset);
      const int place = __shfl_xor_sync(kFullWarp, index, offset);
      const bool better = other > score || (other == score && place < index);
      score = better ? other : score;
      index = better ? place : index;
    }
  }
};

// Multiplies by the factors of the rows of b; NaN, which never is the maximum, past the last row.
template <int kRowTiles>
__device__ __forceinline__ void scale_columns(float (&s)[kRowTiles][kMatchColumns / 8][4],
                                              const float* factors, int column, int partners) {
#pragma unroll
  for (int n = 0; n < kMatchColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = column + 8 * n + 2 * (threadIdx.x % 4) + i;
      const float f = at >= partners ? quiet_nan() : factors ? factors[at] : 1;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) s[m][n][i] *= f, s[m][n][2 + i] *= f;
    }
}

template <typename T, int kRowTiles>
__global__ void __launch_bounds__(kMatchThreads, 2)
    match_kernel(const __grid_constant__ MatchParams p, const __grid_constant__ MatchPlan plan) {
  using Shape = MatchShape<kRowTiles>;
  extern __shared__ uint4 shared[];
  const uint32_t stages_b = shared_address(shared);
  const uint32_t slots_a = stages_b + kMatchStages * Shape::kBytesB;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t b = blockIdx.x / static_cast<unsigned>(plan.row_tiles);
  const int first = blockIdx.x % static_cast<unsigned>(plan.row_tiles) * Shape::kRows;
  const int partners = static_cast<int>(p.partners), channels = static_cast<int>(p.channels);
  const GlobalRows<T> rows_a{static_cast<const T*>(p.a) + b * p.a_batch, p.a_row,
                             static_cast<int>(p.rows), channels, plan.aligned_a};
  const GlobalRows<T> rows_b{static_cast<const T*>(p.b) + b * p.b_batch, p.b_row, partners,
                             channels, plan.aligned_b};
  const float* const factors_b = plan.factors_b ? plan.factors_b + b * p.partners : nullptr;
  const bool resident = plan.slices <= kResidentSlices;

  BestProduct best[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) best[m][0] = best[m][1] = {-infinity(), 0};

  // Next slice of a column tile to load.
  int next_column = 0, next_slice = 0, next_stage = 0;
  const auto load = [&] {
    if (next_column < partners) {
      load_slice<T, kMatchColumns>(stages_b + next_stage * Shape::kBytesB, rows_b, next_column,
                                   next_slice);
      if (!resident || next_column == 0)
        load_slice<T, Shape::kRows>(slots_a + (resident ? next_slice : next_stage) * Shape::kBytesA,
                                    rows_a, first, next_slice);
      if (++next_slice == plan.slices) next_slice = 0, next_column += kMatchColumns;
      if (++next_stage == kMatchStages) next_stage = 0;
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kMatchStages - 1; ++i) load();

  int stage = 0;
#pragma unroll 1
  for (int column = 0; column < partners; column += kMatchColumns) {
    float s[kRowTiles][kMatchColumns / 8][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kMatchColumns / 8; ++n)
        s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
#pragma unroll 1
    for (int slice = 0; slice < plan.slices; ++slice) {
      cp_async_wait<kMatchStages - 2>();
      __syncthreads();
      load();  // overwrites the previous slice, which all threads have read
      multiply_slice<T, kRowTiles>(s, slots_a + (resident ? slice : stage) * Shape::kBytesA,
                                   stages_b + stage * Shape::kBytesB);
      if (++stage == kMatchStages) stage = 0;
    }
    if (factors_b || column + kMatchColumns > partners)
      scale_columns<kRowTiles>(s, factors_b, column, partners);
#pragma unroll
    for (int n = 0; n < kMatchColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            best[m][half].add(s[m][n][2 * half + i], column + 8 * n + 2 * (lane % 4) + i);
  }

#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      best[m][half].reduce();
      const int row = first + (warp * kRowTiles + m) * 16 + lane / 4 + 8 * half;
      if (lane % 4 != 0 || row >= rows_a.rows) continue;
      const int64_t out = b * p.rows + row;
      if (plan.factors_a) best[m][half].scale(plan.factors_a[out], factors_b, partners);
      p.index[out] = partners > 0 ? best[m][half].index : -1;
      p.score[out] = best[m][half].score;
    }
}

__device__ __forceinline__ float factor_of(float squares) {
  if (squares < kMinSquares) return 0;
  return squares <= kMaxSquares ? 1 / sqrtf(squares) : quiet_nan();
}

// blockIdx: rows, sequences. One warp per row, 16 bytes per lane whether aligned or not: the order
// of the sum does not depend on strides.
template <typename T>
__global__ void __launch_bounds__(kMatchThreads)
    factor_kernel(const __grid_constant__ GlobalRows<T> from, int64_t from_batch, int64_t batch,
                  float* factors) {
  constexpr int kCount = kChunkBytes / sizeof(T);
  const int lane = threadIdx.x % kWarpSize;
  const int row = static_cast<int>(blockIdx.x) * kMatchWarps + threadIdx.x / kWarpSize;
  if (row >= from.rows) return;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const T* const x = from.data + b * from_batch + row * from.stride;
    float sum = 0;
    for (int c = lane * kCount; c < from.columns; c += kWarpSize * kCount) {
      Pack<T, kCount> pack{};
      if (from.aligned) {
        pack = *reinterpret_cast<const Pack<T, kCount>*>(x + c);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (c + i < from.columns) pack.x[i] = x[c + i];
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float value = static_cast<float>(pack.x[i]);
        sum = fmaf(value, value, sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) factors[b * from.rows + row] = factor_of(sum);
  }
}

}  // namespace tokenmill::cuda::best_match
