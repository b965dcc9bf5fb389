// Forward: a CTA copies rows, with one or more warps each, or sums a slice of f, each warp over
// every eighth row of rest. Backward: one CTA per run of rows of dx, after the lists are inverted.
#pragma once
#include "cuda/vector.cuh"
#include "tokens/gather_fuse/params.h"
#include "tokens/row_copy.cuh"

namespace tokenmill::cuda::gather_fuse {

constexpr int kFuseThreads = 256, kFuseWarps = kFuseThreads / kWarpSize;
// CTAs per SM: without these ptxas spills to fit more.
constexpr int kFuseBlocks = 4, kFuseBackwardBlocks = 2;

struct FusePlan {
  int slices;      // CTAs that sum f; the CTAs after them copy
  int copy_lanes;  // threads per copied row: a power-of-two number of warps
};

__device__ __forceinline__ bool is_patch(const GatherFuseParams& p, int64_t j) {
  return j >= 0 && j < p.patches;
}

template <typename T, int kVector>
__device__ __forceinline__ void copy_elements(T* to, const T* from, int64_t channels, int lane,
                                              int lanes) {
  using Access = Pack<T, kVector>;
  copy_row(reinterpret_cast<Access*>(to), reinterpret_cast<const Access*>(from), channels / kVector,
           lane, lanes);
}

template <typename T, int kVector>
__device__ __forceinline__ void fuse_copy(const GatherFuseParams& p, int64_t b, int64_t row,
                                          int lanes) {
  if (row >= p.rows() - 1) return;
  const T* x = static_cast<const T*>(p.x) + b * p.x_batch;
  const T* from = nullptr;
  if (row < p.prefix) {
    from = x + row * p.x_token;
  } else {
    const int64_t j = p.keep_ids[b * p.keep_batch + row - p.prefix];
    if (is_patch(p, j)) from = x + (p.prefix + j) * p.x_token;
  }
  T* to = static_cast<T*>(p.out) + b * p.out_batch + row * p.out_row;
  copy_elements<T, kVector>(to, from, p.channels, threadIdx.x & (lanes - 1), lanes);
}

// This warp's partial sum of f, and of the weights. 32 rows are summed from zero, then added.
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
  // Padded so that adjacent channels, which are vectors apart, are in different banks.
  __shared__ float parts[kFuseWarps][kVector][kWarpSize + kWarpSize / kVector];
  __shared__ float totals[kFuseWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t begin = int64_t{slice} * kChannels;
  float sum[kVector] = {};
  const float part = fuse_part<T, kVector>(p, b, begin + lane * kVector, sum);
#pragma unroll
  for (int v = 0; v < kVector; ++v) parts[warp][v][lane] = sum[v];
  if (lane == 0) totals[warp] = part;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int w = 0; w < kFuseWarps; ++w) total += totals[w];
  if (slice == 0 && threadIdx.x == 0) p.weight_sum[b] = total;
  for (int i = threadIdx.x; i < kChannels && begin + i < p.channels; i += kFuseThreads) {
    float f = 0;
#pragma unroll
    for (int w = 0; w < kFuseWarps; ++w) f += parts[w][i % kVector][i / kVector];
    if (p.normalize) f = total == 0 ? 0 : f / total;
    static_cast<T*>(p.out)[b * p.out_batch + (p.rows() - 1) * p.out_row + begin + i] =
        static_cast<T>(f);
  }
  __syncthreads();  // the next sequence overwrites parts
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kFuseThreads, kFuseBlocks)
    gather_fuse_kernel(const __grid_constant__ GatherFuseParams p,
                       const __grid_constant__ FusePlan plan) {
  const int block = static_cast<int>(blockIdx.x), lanes = plan.copy_lanes;
  const int64_t thread = int64_t{block - plan.slices} * kFuseThreads + threadIdx.x;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    if (block < plan.slices)
      fuse_slice<T, kVector>(p, b, block);
    else
      fuse_copy<T, kVector>(p, b, thread >> (31 - __clz(lanes)), lanes);
  }
}

// For a patch named twice the last place wins, in any order of threads.
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

// dx = w df of one token of rest in `channels` channels, and <x - f, df>, where f is 0 if null.
template <typename T, int kVector>
__device__ __forceinline__ float fuse_scale(T* dx, const T* x, const T* df, const T* f, float w,
                                            int channels) {
  float dot = 0;
  for (int c = threadIdx.x % kWarpSize * kVector; c < channels; c += kWarpSize * kVector) {
    float g[kVector], value[kVector], fused[kVector] = {};
    load_floats(g, df + c);
    load_floats(value, x + c);
    if (f) load_floats(fused, f + c);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      dot = fmaf(g[v], value[v] - fused[v], dot);
      g[v] *= w;
    }
    store_floats(dx + c, g);
  }
  return warp_sum(dot);
}

constexpr int kFuseRows = kWarpSize;         // rows of dx per CTA
constexpr int kFuseChannels = 1024;          // channels of df held by a CTA
constexpr int32_t kZeros = -1, kFused = -2;  // instead of a row of dout

// A CTA processes rows of dx, one warp per row in turn. Data shared by its rows of rest, df and, if
// normalized, f, is in shared memory.
template <typename T, int kVector>
__global__ void __launch_bounds__(kFuseThreads, kFuseBackwardBlocks)
    gather_fuse_backward_kernel(const __grid_constant__ GatherFuseBackwardParams q) {
  __shared__ alignas(16) T df[kFuseChannels], f[kFuseChannels];
  __shared__ int32_t sources[kFuseRows];
  __shared__ float weights[kFuseRows], dots[kFuseRows];
  const GatherFuseParams& p = q.forward;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t first = int64_t{blockIdx.x} * kFuseRows, tokens = p.prefix + p.patches;
  const int rows = static_cast<int>(tokens - first < kFuseRows ? tokens - first : kFuseRows);
  // Patch of this lane.
  const int64_t j = first + lane - p.prefix;
  const bool has_weight = warp == 0 && lane < rows && j >= 0;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const float total = p.normalize ? p.weight_sum[b] : 1;
    if (warp == 0 && lane < rows) {
      const int32_t place = j >= 0 ? q.places[b * p.patches + j] : -1;
      int32_t source = kZeros;
      if (j < 0) source = static_cast<int32_t>(first) + lane;
      if (place >= 0 && place < p.kept) source = static_cast<int32_t>(p.prefix) + place;
      if (place >= p.kept && total != 0) source = kFused;
      sources[lane] = source;
      weights[lane] = source == kFused ? p.weight[b * p.weight_batch + j] / total : 0;
      dots[lane] = 0;
    }
    const T* const dout = static_cast<const T*>(q.dout) + b * q.dout_batch;
    const T* const last = dout + (p.rows() - 1) * q.dout_row;
    const T* const fused = static_cast<const T*>(q.fused) + b * q.fused_batch;
    for (int64_t c = 0; c < p.channels; c += kFuseChannels) {
      const int channels =
          static_cast<int>(p.channels - c < kFuseChannels ? p.channels - c : kFuseChannels);
      using Access = Pack<T, kVector>;
      for (int i = threadIdx.x * kVector; i < channels; i += kFuseThreads * kVector) {
        *reinterpret_cast<Access*>(df + i) = *reinterpret_cast<const Access*>(last + c + i);
        if (p.normalize)
          *reinterpret_cast<Access*>(f + i) = *reinterpret_cast<const Access*>(fused + c + i);
      }
      __syncthreads();
      for (int r = warp; r < rows; r += kFuseWarps) {
        const int32_t source = sources[r];
        T* const dx = static_cast<T*>(q.dx) + (b * tokens + first + r) * p.channels + c;
        if (source == kFused) {
          const T* x = static_cast<const T*>(p.x) + b * p.x_batch + (first + r) * p.x_token + c;
          const float dot =
              fuse_scale<T, kVector>(dx, x, df, p.normalize ? f : nullptr, weights[r], channels);
          if (lane == 0) dots[r] += dot;
        } else {
          const T* from = source >= 0 ? dout + source * q.dout_row + c : nullptr;
          copy_elements<T, kVector>(dx, from, channels, lane, kWarpSize);
        }
      }
      __syncthreads();  // df has been read, and dots are written
    }
    if (has_weight) q.dweight[b * p.patches + j] = total == 0 ? 0 : dots[lane] / total;
    __syncwarp();
  }
}

}  // namespace tokenmill::cuda::gather_fuse
