// Epilogue of the backward: gradients from accumulators to global memory.
#pragma once
#include "cuda/arch/ldmatrix.cuh"
#include "cuda/arch/shared_memory.cuh"
#include "cuda/math.cuh"
#include "cuda/tile.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

// Accumulators times factor to a shared-memory tile; 16-column block i goes to block block_of(i).
template <typename T, typename Tile, int kTiles, int kBlocks, typename BlockOf>
__device__ __forceinline__ void put_accumulators(const float (&acc)[kTiles][2 * kBlocks][4],
                                                 float factor, uint32_t tile, int lane,
                                                 const BlockOf& block_of) {
  constexpr int kWords = sizeof(T) / 2;  // words of two elements
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const int column = block_of(i / 2) * 16 + i % 2 * 8 + lane % 4 * 2;  // even
        const int byte = column * static_cast<int>(sizeof(T));
        const uint32_t to = tile + Tile::offset(16 * m + 8 * half + lane / 4, byte / kChunkBytes) +
                            byte % kChunkBytes;
        const float x = acc[m][i][2 * half] * factor, y = acc[m][i][2 * half + 1] * factor;
        if constexpr (kWords == 1)
          store_shared(to, pack<T>(x, y));
        else
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y));
      }
}

// Accumulators times factor to `rows` rows of global memory at `to`, 8 bytes per store; block i
// goes to column `first` + 16 i kBlockStep.
template <int kBlockStep, typename T, int kTiles, int kBlocks>
__device__ __forceinline__ void store_accumulators(const float (&acc)[kTiles][2 * kBlocks][4],
                                                   float factor, T* to, int64_t stride, int rows,
                                                   int first, int dim, int lane) {
  const int g = lane / 4, c = lane % 4;
  // Even lanes take 4 columns of the left half of a block, odd lanes of the right: a warp writes
  // whole sectors.
  first += sizeof(T) == 4 ? 2 * c : c % 2 * 8 + c / 2 * 4;
  to += g * stride + first;
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = 16 * m + 8 * half + g < rows;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int column = 16 * i * kBlockStep;
        const float (&left)[4] = acc[m][2 * i];
        const float (&right)[4] = acc[m][2 * i + 1];
        const float x[4] = {left[2 * half] * factor, left[2 * half + 1] * factor,
                            right[2 * half] * factor, right[2 * half + 1] * factor};
        if constexpr (sizeof(T) == 4) {
          if (inside && first + column < dim)
            *reinterpret_cast<float2*>(to + column) = {x[0], x[1]};
          if (inside && first + column + 8 < dim)
            *reinterpret_cast<float2*>(to + column + 8) = {x[2], x[3]};
        } else {
          const uint32_t a = pack<T>(x[0], x[1]), b = pack<T>(x[2], x[3]);
          const uint32_t got = __shfl_xor_sync(kFullWarp, c % 2 ? a : b, 1);
          if (inside && first + column < dim)
            *reinterpret_cast<uint2*>(to + column) = c % 2 ? uint2{got, b} : uint2{a, got};
        }
      }
      to += 8 * stride;
    }
}

// Transposed accumulators, 16 columns and 8 kCount rows, times factor to `rows` rows.
template <typename T, int kCount>
__device__ __forceinline__ void store_transposed(const float (&acc)[kCount][4], float factor, T* to,
                                                 int64_t stride, int rows, int lane) {
  const int g = lane / 4, c = lane % 4;
  to += g * stride + c % 2 * 8 + c / 2 * 4;  // lane layout as in store_accumulators
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const uint32_t a = transpose(pack<T>(acc[n][0] * factor, acc[n][1] * factor));
    const uint32_t b = transpose(pack<T>(acc[n][2] * factor, acc[n][3] * factor));
    const uint32_t got = __shfl_xor_sync(kFullWarp, c % 2 ? a : b, 1);
    if (8 * n + g < rows)
      *reinterpret_cast<uint2*>(to + 8 * n * stride) = c % 2 ? uint2{got, b} : uint2{a, got};
  }
}

// Copies `rows` rows of a tile to global memory, one element at a time, by one warp.
template <typename Tile, typename T>
__device__ __forceinline__ void store_rows(T* to, int64_t stride, int rows, int dim, uint32_t tile,
                                           int lane) {
#pragma unroll 1
  for (int row = 0; row < rows; ++row, to += stride)
#pragma unroll 1
    for (int column = lane; column < dim; column += kWarpSize) {
      const int byte = column * static_cast<int>(sizeof(T));
      const uint32_t at = tile + Tile::offset(row, byte / kChunkBytes) + byte % kChunkBytes;
      if constexpr (sizeof(T) == 4) {
        to[column] = __uint_as_float(load_word<0>(at));
      } else {
        uint16_t x;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(at));
        reinterpret_cast<uint16_t*>(to)[column] = x;
      }
    }
}

}  // namespace tokenmill::cuda
