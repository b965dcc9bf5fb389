// sm_90a epilogue: rows of a warpgroup's accumulators to shared memory, in the layout of tma.cuh,
// and from there to global memory where TMA cannot store them.
#pragma once
#include "cuda/arch/shared_memory.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/arch/sm90/warpgroup.cuh"
#include "cuda/math.cuh"
#include "cuda/unroll.cuh"

namespace tokenmill::cuda {

// Address of 16-byte chunk `chunk` of row r in a 64-row tile at `tile`.
__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, int r, int chunk) {
  return tile + chunk / 8 * 64 * kBoxRowBytes + r * kBoxRowBytes + (chunk % 8 ^ r % 8) * 16;
}

// Writes columns kFirst .. kFirst + kColumns - 1 of this thread's row h (0 or 1), times factor, to
// the 64-row tile at `tile`; cleared: writes zeros, whatever the accumulators hold.
template <typename T, int h, int kColumns, int kFirst = 0, int kCount>
__device__ __forceinline__ void stage_row(uint32_t tile, const float (&o)[kCount], float factor,
                                          bool cleared) {
  constexpr int kBlock = 64 * kBoxRowBytes;  // bytes of 64 columns
  const int g = threadIdx.x % 32 / 4;
  const uint32_t own = tile + warpgroup_thread() / 32 * 16 * kBoxRowBytes +
                       g * (kBoxRowBytes + 16) + threadIdx.x % 4 * 4;
  unroll<kColumns / 8>([&](auto n) {
    constexpr int at = 4 * (kFirst / 8 + n) + 2 * h;
    const uint32_t both = pack<T>(o[at] * factor, o[at + 1] * factor);
    store_shared<n / 8 * kBlock + h * 8 * kBoxRowBytes>(own ^ n % 8 * 16, cleared ? 0 : both);
  });
}

// Copies the first rows of such a tile to global memory; row r goes to `to` + r step.
template <typename T, int kColumns>
__device__ __forceinline__ void store_rows(T* to, int64_t step, int rows, uint32_t tile) {
  constexpr int kChunks = kColumns / 8;  // 16-byte chunks per row
#pragma unroll 1
  for (int i = warpgroup_thread(); i < rows * kChunks; i += kWarpgroupThreads) {
    const int r = i / kChunks, chunk = i % kChunks;
    uint32_t w[4];
    load_shared(w, chunk_address(tile, r, chunk));
    store_global(to + r * step + chunk * 8, w);
  }
}

}  // namespace tokenmill::cuda
