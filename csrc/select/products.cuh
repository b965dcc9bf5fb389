// S = K Q^T by one warp: key rows directly from global memory, query rows in shared memory.
#pragma once
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/load_tile.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

constexpr int kScoreRows = 16;   // key rows per product
constexpr int kSliceBatch = 4;   // 64-byte slices of key rows loaded at once
constexpr int kSliceBytes = 64;  // 16 per lane of a quad, two MMA k-steps

// s[n] = 16 key rows times columns 8 n .. 8 n + 7 of `queries`, which has `tiles` column tiles.
// Rows g and g + 8 of a lane start at low and high; keys.load(words, row, chunk) reads 16 bytes of
// a row, or zeros past its end. keys.plan has the number of 64-byte slices per row and the byte
// stride between columns.
template <typename T, int kColumnTiles, typename Keys>
__device__ __forceinline__ void multiply_queries(float (&s)[kColumnTiles][4], const Keys& keys,
                                                 const T* low, const T* high, uint32_t queries,
                                                 int tiles) {
  const int lane = threadIdx.x % kWarpSize, c = lane % 4;
  const uint32_t own = queries + lane / 4 * keys.plan.query_bytes + c * kChunkBytes;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll 1
  for (int first = 0; first < keys.plan.slices; first += kSliceBatch) {
    uint32_t k[kSliceBatch][2][4];
#pragma unroll
    for (int j = 0; j < kSliceBatch; ++j) {
      keys.load(k[j][0], low, 4 * (first + j) + c);
      keys.load(k[j][1], high, 4 * (first + j) + c);
    }
#pragma unroll
    for (int j = 0; j < kSliceBatch; ++j) {
      if (first + j >= keys.plan.slices) break;
      Fragment<T, 4> a[2];
#pragma unroll
      for (int u = 0; u < 2; ++u)
        a[u] = make_fragment<T>(k[j][0][2 * u], k[j][1][2 * u], k[j][0][2 * u + 1],
                                k[j][1][2 * u + 1]);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if (n >= tiles) break;
        uint32_t w[4];
        load_shared(w, own + 8 * n * keys.plan.query_bytes + (first + j) * kSliceBytes);
#pragma unroll
        for (int u = 0; u < 2; ++u) mma(s[n], a[u], make_fragment<T>(w[2 * u], w[2 * u + 1]));
      }
    }
  }
}

}  // namespace tokenmill::cuda
