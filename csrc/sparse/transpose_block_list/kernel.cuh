// Counting sort of each list head's entries by key block, in three kernels. The rows are split into
// parts with separate counts; within a part rows are processed in order, and an id counts at most
// once per row, so that output indices need no atomics and the rows of a block ascend.
#pragma once
#include <cub/block/block_scan.cuh>

#include "sparse/list_walk.cuh"
#include "sparse/transpose_block_list/params.h"

namespace tokenmill::cuda::transpose_block_list {

constexpr int kTransposeThreads = 128, kScanThreads = 1024;

struct TransposePlan {
  int parts;      // parts of the rows of a head
  int part_rows;  // rows of each part but the last
  int32_t* ids;   // [B, heads, rows, entries]: valid ids, else -1
  // [B, heads, parts, blocks]: entries per part, then the output index of the next one
  int32_t* places;
};

__device__ inline int32_t* places_of(const TransposeBlockListParams& p, const TransposePlan& plan,
                                     int64_t head, int64_t part) {
  return plan.places + (head * plan.parts + part) * p.blocks;
}

// One warp per row.
__global__ void __launch_bounds__(kTransposeThreads)
    transpose_count_kernel(const __grid_constant__ TransposeBlockListParams p,
                           const __grid_constant__ TransposePlan plan) {
  constexpr int kWarps = kTransposeThreads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int entries = static_cast<int>(p.list.entries);
  const int64_t total = p.batch * p.list.heads * p.list.rows;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize; i < total;
       i += int64_t{gridDim.x} * kWarps) {
    const int64_t head = i / p.list.rows, row = i % p.list.rows;
    const int64_t b = head / p.list.heads, h = head % p.list.heads;
    const int32_t* list = p.list.at(b, h, row);
    const int count = static_cast<int>(p.list.count(b, h, row));
    int32_t* ids = plan.ids + i * entries;
    int32_t* counts = places_of(p, plan, head, row / plan.part_rows);
    WarpListWalk walk{static_cast<int>(p.blocks)};
    for (int first = 0; first < entries; first += kWarpSize) {
      const int e = first + lane, id = e < count ? list[e] : -1;
      const bool counted = walk.counts(id);
      if (e < entries) ids[e] = counted ? id : -1;
      if (counted) atomicAdd(counts + id, 1);
    }
  }
}

// One CTA per head: offsets of the blocks, and of each part within them.
__global__ void __launch_bounds__(kScanThreads)
    transpose_scan_kernel(const __grid_constant__ TransposeBlockListParams p,
                          const __grid_constant__ TransposePlan plan) {
  using Scan = cub::BlockScan<int32_t, kScanThreads>;
  __shared__ typename Scan::TempStorage shared;
  const int64_t head = blockIdx.x;
  int32_t* offsets = p.offsets + head * (p.blocks + 1);
  int32_t* places = places_of(p, plan, head, 0);
  int32_t before = 0;
  for (int64_t first = 0; first < p.blocks; first += kScanThreads) {
    const int64_t j = first + threadIdx.x;
    const bool exists = j < p.blocks;
    int32_t count = 0;
    for (int part = 0; exists && part < plan.parts; ++part) count += places[part * p.blocks + j];
    int32_t place, total;
    Scan(shared).ExclusiveSum(count, place, total);
    __syncthreads();  // `shared` has been read
    place += before;
    before += total;
    if (!exists) continue;
    offsets[j] = place;
    for (int part = 0; part < plan.parts; ++part) {
      const int32_t of_part = places[part * p.blocks + j];
      places[part * p.blocks + j] = place;
      place += of_part;
    }
  }
  if (threadIdx.x == 0) offsets[p.blocks] = before;
}

// One CTA per part.
__global__ void __launch_bounds__(kTransposeThreads)
    transpose_place_kernel(const __grid_constant__ TransposeBlockListParams p,
                           const __grid_constant__ TransposePlan plan) {
  const int64_t head = blockIdx.x / plan.parts, part = blockIdx.x % plan.parts;
  const int64_t begin = part * plan.part_rows;
  const int64_t end = begin + plan.part_rows < p.list.rows ? begin + plan.part_rows : p.list.rows;
  const int entries = static_cast<int>(p.list.entries);
  int32_t* places = places_of(p, plan, head, part);
  int32_t* rows = p.rows + head * p.list.rows * entries;
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* ids = plan.ids + (head * p.list.rows + row) * entries;
    for (int e = threadIdx.x; e < entries; e += kTransposeThreads)
      if (const int id = ids[e]; id >= 0) rows[places[id]++] = static_cast<int32_t>(row);
    __syncthreads();
  }
}

}  // namespace tokenmill::cuda::transpose_block_list
