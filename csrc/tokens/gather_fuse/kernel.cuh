// Forward: a block copies rows, a warp each, or sums a slice of f, each warp over every eighth row
// of rest. Backward: a warp for each row of dx, after the lists were turned around.
#pragma once
#include "cuda/vector.cuh"
#include "tokens/gather_fuse/params.h"
#include "tokens/row_copy.cuh"

namespace tokenmill::cuda {

constexpr int kFuseThreads = 256, kFuseWarps = kFuseThreads / kWarpSize;
constexpr int kFuseBlocks = 4;  // per multiprocessor: left alone, ptxas spills to fit more

struct FusePlan {
  int slices;  // blocks that sum f; those behind them copy
};

__device__ __forceinline__ bool is_patch(const GatherFuseParams& p, int64_t j) {
  return j >= 0 && j < p.patches;
}

template <typename T, int kVector>
__device__ __forceinline__ void copy_elements(T* to, const T* from, int64_t channels, int lane) {
  using Access = Pack<T, kVector>;
  copy_row(reinterpret_cast<Access*>(to), reinterpret_cast<const Access*>(from), channels / kVector,
           lane, kWarpSize);
}

template <typename T, int kVector>
__device__ __forceinline__ void fuse_copy(const GatherFuseParams& p, int64_t b, int64_t row) {
  if (row >= p.rows() - 1) return;
  const T* x = static_cast<const T*>(p.x) + b * p.x_batch;
  const T* from = nullptr;
  if (row < p.prefix) {
    from = x + row * p.x_token;
  } else {
    const int64_t j = p.keep_ids[b * p.keep_batch + row - p.prefix];
    if (is_patch(p, j)) from = x + (p.prefix + j) * p.x_token;
  }
  T* to = static_cast<T*>(p.out) + (b * p.rows() + row) * p.channels;
  copy_elements<T, kVector>(to, from, p.channels, threadIdx.x % kWarpSize);
}

// This warp's part of f, and of the sum of the weights. 32 rows are summed from zero, then added.
template <typename T, int kVector>
__device__ __forceinline__ float fuse_part(const GatherFuseParams& p, int64_t b, int64_t c,
                                           float (&sum)[kVector]) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const T* x = static_cast<const T*>(p.x) + b * p.x_batch + p.prefix * p.x_token + c;
  const int32_t* ids = p.rest_ids + b * p.rest_batch;
  const float* weights = p.weight + b * p.weight_batch;
  float total = 0;
  for (int64_t first = 0; first < p.rest; first += kFuseThreads) {
    const int64_t r = first + warp + lane * kFuseWarps;
    int id = r < p.rest ? ids[r] : -1;
    if (!is_patch(p, id)) id = -1;
    const float weight = id >= 0 ? weights[id] : 0;
    total += weight;
    float part[kVector] = {};
    const int64_t left = p.rest - first - warp;
    const int rows =
        left < kFuseThreads ? static_cast<int>(left + kFuseWarps - 1) / kFuseWarps : kWarpSize;
#pragma unroll 4
    for (int i = 0; i < rows; ++i) {
      const int j = __shfl_sync(kFullWarp, id, i);
      const float w = __shfl_sync(kFullWarp, weight, i);
      float value[kVector] = {};
      if (j >= 0 && c < p.channels) load_floats(value, x + j * p.x_token);
#pragma unroll
      for (int v = 0; v < kVector; ++v)
        if (j >= 0) part[v] = fmaf(w, value[v], part[v]);
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum[v] += part[v];
  }
  return warp_sum(total);
}

template <typename T, int kVector>
__device__ __forceinline__ void fuse_slice(const GatherFuseParams& p, int64_t b, int slice) {
  constexpr int kChannels = kWarpSize * kVector;
  __shared__ float parts[kFuseWarps][kChannels];
  __shared__ float totals[kFuseWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t begin = int64_t{slice} * kChannels;
  float sum[kVector] = {};
  const float part = fuse_part<T, kVector>(p, b, begin + lane * kVector, sum);
#pragma unroll
  for (int v = 0; v < kVector; ++v) parts[warp][lane * kVector + v] = sum[v];
  if (lane == 0) totals[warp] = part;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int w = 0; w < kFuseWarps; ++w) total += totals[w];
  if (slice == 0 && threadIdx.x == 0) p.weight_sum[b] = total;
  for (int i = threadIdx.x; i < kChannels && begin + i < p.channels; i += kFuseThreads) {
    float f = 0;
#pragma unroll
    for (int w = 0; w < kFuseWarps; ++w) f += parts[w][i];
    if (p.normalize) f = total == 0 ? 0 : f / total;
    static_cast<T*>(p.out)[(b + 1) * p.rows() * p.channels - p.channels + begin + i] =
        static_cast<T>(f);
  }
  __syncthreads();  // the next sequence writes parts
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kFuseThreads, kFuseBlocks)
    gather_fuse_kernel(const __grid_constant__ GatherFuseParams p,
                       const __grid_constant__ FusePlan plan) {
  const int block = static_cast<int>(blockIdx.x);
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    if (block < plan.slices)
      fuse_slice<T, kVector>(p, b, block);
    else
      fuse_copy<T, kVector>(p, b,
                            int64_t{block - plan.slices} * kFuseWarps + threadIdx.x / kWarpSize);
  }
}

// Of a patch named twice the last place stays, in any order of threads.
__global__ void __launch_bounds__(kFuseThreads)
    fuse_places_kernel(const __grid_constant__ GatherFuseBackwardParams q) {
  const GatherFuseParams& p = q.forward;
  const int64_t i = int64_t{blockIdx.x} * kFuseThreads + threadIdx.x;
  if (i >= p.kept + p.rest) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int64_t j =
        i < p.kept ? p.keep_ids[b * p.keep_batch + i] : p.rest_ids[b * p.rest_batch + i - p.kept];
    if (is_patch(p, j)) atomicMax(q.places + b * p.patches + j, static_cast<int>(i));
  }
}

// dx = w df of one token of rest, and <x - f, df>, where f is 0 unless normalized.
template <typename T, int kVector>
__device__ __forceinline__ float fuse_scale(const GatherFuseBackwardParams& q, T* dx, const T* x,
                                            const T* df, const T* f, float w) {
  const GatherFuseParams& p = q.forward;
  float dot = 0;
  for (int64_t c = threadIdx.x % kWarpSize * kVector; c < p.channels; c += kWarpSize * kVector) {
    float g[kVector], value[kVector], fused[kVector] = {};
    load_floats(g, df + c);
    load_floats(value, x + c);
    if (p.normalize) load_floats(fused, f + c);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      dot = fmaf(g[v], value[v] - fused[v], dot);
      g[v] *= w;
    }
    store_floats(dx + c, g);
  }
  return warp_sum(dot);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kFuseThreads)
    gather_fuse_backward_kernel(const __grid_constant__ GatherFuseBackwardParams q) {
  const GatherFuseParams& p = q.forward;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t n = int64_t{blockIdx.x} * kFuseWarps + threadIdx.x / kWarpSize;
  const int64_t tokens = p.prefix + p.patches, j = n - p.prefix;
  if (n >= tokens) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const T* dout = static_cast<const T*>(q.dout) + b * q.dout_batch;
    T* dx = static_cast<T*>(q.dx) + (b * tokens + n) * p.channels;
    const int64_t place = j >= 0 ? q.places[b * p.patches + j] : 0;
    const float total = p.normalize ? p.weight_sum[b] : 1;
    float dw = 0;
    if (j >= 0 && place >= p.kept && total != 0) {
      const T* x = static_cast<const T*>(p.x) + b * p.x_batch + n * p.x_token;
      const T* f = static_cast<const T*>(q.fused) + b * q.fused_batch;
      const float w = p.weight[b * p.weight_batch + j] / total;
      const T* df = dout + (p.rows() - 1) * q.dout_row;
      dw = fuse_scale<T, kVector>(q, dx, x, df, f, w) / total;
    } else {
      const T* from = nullptr;
      if (j < 0) from = dout + n * q.dout_row;
      if (j >= 0 && place >= 0 && place < p.kept) from = dout + (p.prefix + place) * q.dout_row;
      copy_elements<T, kVector>(dx, from, p.channels, lane);
    }
    if (j >= 0 && lane == 0) q.dweight[b * p.patches + j] = dw;
  }
}

}  // namespace tokenmill::cuda
