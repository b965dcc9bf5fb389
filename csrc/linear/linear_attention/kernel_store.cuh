// Stores a warp's outputs of a chunk: 16 columns, transposed in the accumulators.
#pragma once
#include "linear/linear_attention/kernel_products.cuh"

namespace tokenmill::cuda::linear_attention {

// Stores n rows, `step` elements apart; columns from `columns` on are skipped.
template <typename Shape>
__device__ __forceinline__ void store_accumulators(float* out, int64_t step,
                                                   const float (&acc)[Shape::kTokens / 8][4], int n,
                                                   int columns) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int t = 0; t < Shape::kTokens / 8; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * t + 2 * c + i % 2, column = g + i / 2 * 8;
      if (row < n && column < columns) out[row * step + column] = acc[t][i];
    }
}

// 16-bit outputs are staged in the warp's own columns of V in shared memory, from `own` on, which
// are no longer needed.
template <typename T, typename Shape>
__device__ __forceinline__ void store_packed(T* out, int64_t step,
                                             const float (&acc)[Shape::kTokens / 8][4], int n,
                                             int columns, bool aligned, uint32_t values, int own) {
  using Tile = typename Shape::ValueTile;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
  __syncwarp();
#pragma unroll
  for (int t = 0; t < Shape::kTokens / 8; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      store_shared(values + Tile::offset(8 * t + g, own / 8 + h) + 4 * c,
                   transpose(pack<T>(acc[t][2 * h], acc[t][2 * h + 1])));
  __syncwarp();
  const uint32_t chunk = ValueFragments<T, Shape>::own_chunk(values, own);
  const int own_row = lane % 8 + lane / 16 * 8, own_column = lane / 8 % 2 * 8;
  unroll<Shape::kTokens / 16>([&](auto i) {
    uint32_t words[4];
    load_shared<i * 16 * Tile::kRowBytes>(words, chunk);
    const int row = 16 * i + own_row;
    if (row >= n) return;
    T* const to = out + row * step + own_column;
    if (aligned && own_column < columns) {
      store_global(to, words);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (own_column + e < columns) to[e] = reinterpret_cast<const T*>(words)[e];
    }
  });
}

}  // namespace tokenmill::cuda::linear_attention
