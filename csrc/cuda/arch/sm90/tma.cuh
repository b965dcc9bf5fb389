// TMA copies of boxes of a tensor that a tensor map describes. One thread issues them.
//
// A box is a 64-column block of a tile: rows of 64 16-bit elements, 128 bytes, with the 128-byte
// swizzle: 16-byte chunk c lies at chunk c ^ row % 8. A tile of more columns is several such blocks
// in succession. It starts at a multiple of 1024 bytes of shared memory.
#pragma once
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/arch/shared_memory.cuh"
#include "cuda/arch/sm90/mbarrier.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/unroll.cuh"

namespace tokenmill::cuda {

// TMA coordinates of a box.
struct BoxPlace {
  int row, head, batch;
  int column = 0;
};

// Loads kColumns columns of kRows rows to shared memory, zeros outside of the tensor. `full` counts
// all kRows * kColumns * 2 bytes.
template <int kRows, int kColumns>
__device__ __forceinline__ void load_boxes(const CUtensorMap& map, const BoxPlace& at, void* tile,
                                           Mbarrier& full) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
#pragma unroll
  for (int i = 0; i < kColumns / kBoxColumns; ++i)
    cute::SM90_TMA_LOAD_4D::copy(&map, full.word(), kHint,
                                 static_cast<char*>(tile) + i * kRows * kBoxRowBytes,
                                 at.column + i * kBoxColumns, at.row, at.head, at.batch);
}

// Stores a tile that all threads wrote before a fence_stores(); rows and columns outside of the
// tensor are clipped. The stores form one bulk group.
template <int kRows, int kColumns>
__device__ __forceinline__ void store_boxes(const CUtensorMap& map, const BoxPlace& at,
                                            const void* tile) {
#pragma unroll
  for (int i = 0; i < kColumns / kBoxColumns; ++i)
    cute::SM90_TMA_STORE_4D::copy(&map, static_cast<const char*>(tile) + i * kRows * kBoxRowBytes,
                                  at.column + i * kBoxColumns, at.row, at.head, at.batch);
  cute::tma_store_arrive();
}

// Clears rows begin .. end - 1 of a tile of kRows rows that has landed. Called by all lanes of a
// warp; a fence_stores() must follow before a product reads the tile.
template <int kRows, int kColumns>
__device__ __forceinline__ void clear_rows(void* tile, int begin, int end = kRows) {
  constexpr uint32_t kZeros[4] = {0, 0, 0, 0};
  const uint32_t to = shared_address(tile);
#pragma unroll 1
  for (int at = begin * kBoxRowBytes + threadIdx.x % 32 * 16; at < end * kBoxRowBytes;
       at += 32 * 16)
    unroll<kColumns / kBoxColumns>(
        [&](auto block) { store_shared<block * kRows * kBoxRowBytes>(to + at, kZeros); });
}

// Proxy fence: this thread's writes to shared memory are visible to copies issued afterwards, and
// what it read is not overwritten by them before.
__device__ __forceinline__ void fence_stores() { cute::tma_store_fence(); }

// Waits until the thread's groups of stores have read shared memory.
__device__ __forceinline__ void wait_for_stores() { cute::tma_store_wait<0>(); }

}  // namespace tokenmill::cuda
