// One warp per row (b, s, h): memory-bound, outs is read once forward and twice backward. The grid
// is (heads, positions / warps, batch), each dimension capped, beyond which CTAs take several rows:
// this needs no division, which for 64-bit numbers is a call that spills registers.
#pragma once
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "dense/merge_attention_states/params.h"

namespace tokenmill::cuda::merge_attention_states {

constexpr int kMergeThreads = 128;
constexpr int kMergeBlocks = 4;  // CTAs per SM: without this bound, ptxas spills to fit more

constexpr int kMergeWarps = kMergeThreads / kWarpSize;

struct MergeRow {
  int64_t index, outs, lses, lse;  // offsets of the row in elements

  __device__ MergeRow(const MergeParams& p, int64_t b, int64_t s, int64_t h)
      : index((b * p.seqlen + s) * p.heads + h),
        outs(b * p.outs_batch + s * p.outs_seq + h * p.outs_head),
        lses(b * p.lses_batch + h * p.lses_head + s * p.lses_seq),
        lse((b * p.heads + h) * p.seqlen + s) {}
};

// Calls visit(b, s, h) for each row of this warp.
template <typename Visit>
__device__ __forceinline__ void visit_rows(const MergeParams& p, const Visit& visit) {
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t s = int64_t(blockIdx.y) * kMergeWarps + threadIdx.x / kWarpSize; s < p.seqlen;
         s += int64_t(gridDim.y) * kMergeWarps)
      for (int64_t h = blockIdx.x; h < p.heads; h += gridDim.x) visit(b, s, h);
}

// Scale of a row: w_i = exp(lse_i - row_max) / sum. log sum_j exp(lse_j), once rounded, is too
// coarse to compute weights from.
struct MergeScale {
  float row_max = 0, sum = 1;

  __device__ MergeScale(const MergeParams& p, const MergeRow& row) {
    if (!p.lses) return;
    const int lane = threadIdx.x % kWarpSize;
    float top = -INFINITY, part = 0;
#pragma unroll 1
    for (int64_t i = lane; i < p.parts; i += kWarpSize)
      top = fmaxf(top, p.lses[row.lses + i * p.lses_part]);
    top = warp_max(top);
    row_max = top == -INFINITY ? 0 : top;
#pragma unroll 1
    for (int64_t i = lane; i < p.parts; i += kWarpSize)
      part += expf(p.lses[row.lses + i * p.lses_part] - row_max);
    sum = warp_sum(part);
  }

  // An empty part has weight 0, whatever its out holds.
  __device__ __forceinline__ float weight(const MergeParams& p, const MergeRow& row,
                                          int64_t i) const {
    if (!p.lses) return 1.f;
    const float x = p.lses[row.lses + i * p.lses_part];
    return x == -INFINITY ? 0.f : __fdividef(expf(x - row_max), sum);
  }
};

// out = sum_i w_i outs_i for channels `first`, `first` + step, ... of the row, kVector at a time.
template <typename T, int kVector>
__device__ __forceinline__ void merge_channels(const MergeParams& p, const MergeRow& row,
                                               const MergeScale& scale, int64_t first, int64_t end,
                                               int64_t step) {
  const T* outs = static_cast<const T*>(p.outs);
  T* out = static_cast<T*>(p.out);
  for (int64_t d = first; d < end; d += step) {
    float sum[kVector] = {}, x[kVector];
    for (int64_t i = 0; i < p.parts; ++i) {
      const float w = scale.weight(p, row, i);
      if (w == 0) continue;
      load_floats(x, outs + row.outs + i * p.outs_part + d);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[j] = fmaf(w, x[j], sum[j]);
    }
    store_floats(out + row.index * p.dim + d, sum);
  }
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kMergeThreads, kMergeBlocks)
    merge_kernel(const __grid_constant__ MergeParams p) {
  const int lane = threadIdx.x % kWarpSize;
  visit_rows(p, [&](int64_t b, int64_t s, int64_t h) {
    const MergeRow row(p, b, s, h);
    const MergeScale scale(p, row);
    if (p.lses && lane == 0) p.lse[row.lse] = scale.row_max + logf(scale.sum);
    merge_channels<T, kVector>(p, row, scale, lane * kVector, p.dim, kWarpSize * kVector);
  });
}

// The same for few rows: one-warp CTAs, grid (heads * slices of `slice` channels, positions,
// batch). An element is summed over the parts in the same order whatever its slice.
template <typename T, int kVector>
__global__ void __launch_bounds__(kWarpSize)
    merge_slices_kernel(const __grid_constant__ MergeParams p, unsigned slices, int64_t slice) {
  const int lane = threadIdx.x;
  const unsigned h = blockIdx.x / slices;
  const int64_t begin = (blockIdx.x - h * slices) * slice, end = min(p.dim, begin + slice);
  const MergeRow row(p, blockIdx.z, blockIdx.y, h);
  const MergeScale scale(p, row);
  if (p.lses && begin == 0 && lane == 0) p.lse[row.lse] = scale.row_max + logf(scale.sum);
  merge_channels<T, kVector>(p, row, scale, begin + lane * kVector, end, kWarpSize * kVector);
}

// With delta_i = dout.outs_i and delta = sum_i w_i delta_i:
//   douts_i = w_i dout,  dlses_i = w_i (delta_i - delta + dlse).
template <typename T, int kVector>
__global__ void __launch_bounds__(kMergeThreads, kMergeBlocks)
    merge_backward_kernel(const __grid_constant__ MergeBackwardParams q) {
  const MergeParams& p = q.forward;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t rows = p.batch * p.seqlen * p.heads;
  const T* outs = static_cast<const T*>(p.outs);
  const T* dout = static_cast<const T*>(q.dout);
  T* douts = static_cast<T*>(q.douts);
  visit_rows(p, [&](int64_t b, int64_t s, int64_t h) {
    const MergeRow row(p, b, s, h);
    const T* g = dout + b * q.dout_batch + s * q.dout_seq + h * q.dout_head;
    const MergeScale scale(p, row);
    float delta = 0;
    for (int64_t i = 0; i < p.parts; ++i) {
      const float w = scale.weight(p, row, i);
      float dot = 0;
      for (int64_t d = lane * kVector; d < p.dim; d += kWarpSize * kVector) {
        float gd[kVector], x[kVector] = {};
        load_floats(gd, g + d);
        if (p.lses && w != 0) load_floats(x, outs + row.outs + i * p.outs_part + d);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          dot = fmaf(gd[j], x[j], dot);
          gd[j] = w != 0 ? w * gd[j] : 0;
        }
        store_floats(douts + (i * rows + row.index) * p.dim + d, gd);
      }
      if (!p.lses) continue;
      dot = w != 0 ? warp_sum(dot) : 0;
      delta = fmaf(w, dot, delta);
      if (lane == 0) q.dlses[i * rows + row.lse] = dot;
    }
    if (!p.lses) return;
    __syncwarp();  // lane 0's dlses become visible to the warp
    if (q.dlse) delta -= q.dlse[row.lse];
#pragma unroll 1
    for (int64_t i = lane; i < p.parts; i += kWarpSize) {
      const float w = scale.weight(p, row, i);
      float* dlse = q.dlses + i * rows + row.lse;
      *dlse = w != 0 ? w * (*dlse - delta) : 0;
    }
  });
}

}  // namespace tokenmill::cuda::merge_attention_states
