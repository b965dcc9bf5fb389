// Packs the tokens selected by a mask: counts per chunk, a scan of the counts, then each token is
// written to its output index. The mask is read once and kept as bits.
#pragma once
#include <cub/block/block_scan.cuh>

#include "cuda/warp.cuh"
#include "tokens/mask_partition/params.h"

namespace tokenmill::cuda::mask_partition {

constexpr int kMaskThreads = 256, kMaskScanThreads = 1024;
constexpr int kMaskWarps = kMaskThreads / kWarpSize;
constexpr int kMaskSteps = 8;  // steps of 32 tokens per warp
constexpr int kMaskChunk = kMaskThreads * kMaskSteps;

// Tokens of a warp's part of a chunk: bit l of step j is token 32 j + l.
struct MaskBits {
  unsigned bits[kMaskSteps];
  int count;

  // Reads the bits stored by an earlier kernel.
  __device__ __forceinline__ explicit MaskBits(const uint4* kept) : count(0) {
#pragma unroll
    for (int j = 0; j < kMaskSteps; j += 4) {
      const uint4 four = kept[j / 4];
      bits[j] = four.x, bits[j + 1] = four.y, bits[j + 2] = four.z, bits[j + 3] = four.w;
    }
#pragma unroll
    for (int j = 0; j < kMaskSteps; ++j) count += __popc(bits[j]);
  }

  // Called by lanes 0 to kMaskSteps - 1.
  __device__ __forceinline__ void keep(unsigned* to) const {
    unsigned own = 0;
#pragma unroll
    for (int j = 0; j < kMaskSteps; ++j)
      if (threadIdx.x % kWarpSize == j) own = bits[j];
    if (threadIdx.x % kWarpSize < kMaskSteps) to[threadIdx.x % kWarpSize] = own;
  }

  __device__ __forceinline__ MaskBits(const MaskPartitionParams& p, uint32_t first) : count(0) {
    const uint32_t total = static_cast<uint32_t>(p.batch * p.tokens);
    const uint32_t tokens = static_cast<uint32_t>(p.tokens);
#pragma unroll
    for (int j = 0; j < kMaskSteps; ++j) {
      const uint32_t i = first + j * kWarpSize + threadIdx.x % kWarpSize;
      const uint32_t b = i / tokens;
      const bool taken = i < total && p.mask[b * p.mask_batch + (i - b * tokens)] != 0;
      bits[j] = __ballot_sync(kFullWarp, taken);
      count += __popc(bits[j]);
    }
  }
};

__device__ __forceinline__ uint32_t first_of_warp() {
  return blockIdx.x * kMaskChunk + threadIdx.x / kWarpSize * (kWarpSize * kMaskSteps);
}
// Address of the bits of a warp.
__device__ __forceinline__ unsigned* bits_of_warp(unsigned* bits) {
  return bits + first_of_warp() / kWarpSize;
}

// Selected tokens in the earlier warps of this CTA, and in all of them.
__device__ __forceinline__ int2 sums_of_block(int count) {
  __shared__ int counts[kMaskWarps];
  if (threadIdx.x % kWarpSize == 0) counts[threadIdx.x / kWarpSize] = count;
  __syncthreads();
  int2 sums{0, 0};
#pragma unroll
  for (int w = 0; w < kMaskWarps; ++w) {
    if (w < static_cast<int>(threadIdx.x) / kWarpSize) sums.x += counts[w];
    sums.y += counts[w];
  }
  return sums;
}

__global__ void __launch_bounds__(kMaskThreads)
    mask_count_kernel(const __grid_constant__ MaskPartitionParams p, unsigned* bits,
                      int32_t* counts) {
  const MaskBits mask(p, first_of_warp());
  mask.keep(bits_of_warp(bits));
  const int2 sums = sums_of_block(mask.count);
  if (threadIdx.x == 0) counts[blockIdx.x] = sums.y;
}

// Exclusive scan of chunk counts to output offsets. One CTA.
__global__ void __launch_bounds__(kMaskScanThreads)
    mask_scan_kernel(const __grid_constant__ MaskPartitionParams p, int32_t* counts, int chunks) {
  using Scan = cub::BlockScan<int32_t, kMaskScanThreads>;
  __shared__ typename Scan::TempStorage shared;
  int32_t before = 0;
  for (int first = 0; first < chunks; first += kMaskScanThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    int32_t place, total;
    Scan(shared).ExclusiveSum(i < chunks ? counts[i] : 0, place, total);
    if (i < chunks) counts[i] = before + place;
    before += total;
    __syncthreads();  // `shared` has been read
  }
  if (threadIdx.x == 0) p.cu_seqlens[p.batch] = min(before, static_cast<int32_t>(p.size));
}

__global__ void __launch_bounds__(kMaskThreads)
    mask_write_kernel(const __grid_constant__ MaskPartitionParams p, unsigned* bits,
                      const int32_t* begins) {
  __shared__ int32_t packed[kMaskChunk];
  const uint32_t first = first_of_warp(), lane = threadIdx.x % kWarpSize;
  const uint32_t total = static_cast<uint32_t>(p.batch * p.tokens);
  const uint32_t tokens = static_cast<uint32_t>(p.tokens);
  const int32_t size = static_cast<int32_t>(p.size);
  const MaskBits mask(reinterpret_cast<const uint4*>(bits_of_warp(bits)));
  const int32_t begin = begins[blockIdx.x];
  const int2 sums = sums_of_block(mask.count);
  int32_t place = sums.x;  // within the CTA
#pragma unroll
  for (int j = 0; j < kMaskSteps; ++j) {
    const uint32_t i = first + j * kWarpSize + lane;
    const int32_t at = place + __popc(mask.bits[j] & ((1u << lane) - 1));
    place += __popc(mask.bits[j]);
    if (i >= total) continue;
    const bool taken = (mask.bits[j] >> lane & 1) != 0;
    if (taken) packed[at] = static_cast<int32_t>(i);
    p.inverse[i] = taken && begin + at < size ? begin + at : -1;
    const uint32_t b = i / tokens;
    if (i == b * tokens) p.cu_seqlens[b] = min(begin + at, size);
  }
  __syncthreads();
  // Starts at an aligned index before the CTA's first one, so that warps write whole sectors.
  const uint32_t from = static_cast<uint32_t>(begin), end = min(begin + sums.y, size);
  for (uint32_t at = from / 8 * 8 + threadIdx.x; at < end; at += kMaskThreads)
    if (at >= from) p.indices[at] = packed[at - from];
}

}  // namespace tokenmill::cuda::mask_partition
