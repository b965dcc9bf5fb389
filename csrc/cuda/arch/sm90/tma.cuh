// Copies of boxes of a tensor, which a tensor map describes, by the copy engine. One thread issues
// them.
//
// A box is a column block of a tile: rows of 64 elements of 16 bits, 128 bytes, whose 16-byte chunk
// c lies at chunk c ^ row % 8. A tile of more columns is several blocks, one behind the other. It
// begins at a multiple of 1024 bytes of shared memory.
#pragma once
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/arch/shared_memory.cuh"
#include "cuda/arch/sm90/mbarrier.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/unroll.cuh"

namespace tokenmill::cuda {

// Where boxes begin: row `row` of head `head` of batch entry `batch`, and its column.
struct BoxPlace {
  int row, head, batch;
  int column = 0;
};

// kColumns of kRows rows to shared memory, zeros where the tensor has none: neither rows nor
// columns. `full` takes the bytes, kRows * kColumns * 2.
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

// The other way, of what all threads wrote before a fence_stores; rows and columns that the tensor
// does not have are left out. The stores are a group.
template <int kRows, int kColumns>
__device__ __forceinline__ void store_boxes(const CUtensorMap& map, const BoxPlace& at,
                                            const void* tile) {
#pragma unroll
  for (int i = 0; i < kColumns / kBoxColumns; ++i)
    cute::SM90_TMA_STORE_4D::copy(&map, static_cast<const char*>(tile) + i * kRows * kBoxRowBytes,
                                  at.column + i * kBoxColumns, at.row, at.head, at.batch);
  cute::tma_store_arrive();
}

// Makes zeros of rows begin .. end - 1 of a tile of kRows rows, which has arrived. The lanes of a
// warp together; a fence_stores comes before products read it.
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

// What a thread wrote to shared memory is seen by copies that are issued behind it, and what it
// read is not overwritten by them before.
__device__ __forceinline__ void fence_stores() { cute::tma_store_fence(); }

// The thread's groups of stores have read shared memory.
__device__ __forceinline__ void wait_for_stores() { cute::tma_store_wait<0>(); }

}  // namespace tokenmill::cuda
