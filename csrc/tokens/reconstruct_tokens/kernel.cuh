// Weighted sums after the search for the nearest centroids (nearest.cuh), and the gradient.
#pragma once
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "tokens/reconstruct_tokens/params.h"

namespace tokenmill::cuda::reconstruct_tokens {

constexpr int kReconstructWarps = 4, kReconstructThreads = kReconstructWarps * kWarpSize;

// Converts a list by distance to a list by index, with weights. Called by one warp.
__device__ __forceinline__ void write_list(const ReconstructParams& p, const float* d,
                                           const int32_t* ids, int32_t* index, float* weight) {
  const int lane = threadIdx.x % kWarpSize, k = static_cast<int>(p.k);
  const float minimum = d[0], factor = p.tau * kLog2e;
  const auto weight_of = [&](int e) {
    return minimum < 3.402823466e38f ? exp2_approx((minimum - d[e]) * factor) : quiet_nan();
  };
  float sum = 0;
  for (int e = lane; e < k; e += kWarpSize) {
    const float w = weight_of(e);
    sum += p.unit_norm ? w * w : w;
  }
  sum = warp_sum(sum);
  const float norm = p.unit_norm ? sqrtf(sum) : sum;
  for (int e = lane; e < k; e += kWarpSize) {
    const int32_t id = ids[e];
    int rank = 0;
    for (int other = 0; other < k; ++other) rank += ids[other] < id;
    index[rank] = id;
    weight[rank] = weight_of(e) / norm;
  }
  __syncwarp();
}

// Grid: tokens, sequences. One warp per token.
template <typename T, int kVector>
__global__ void __launch_bounds__(kReconstructThreads)
    reconstruct_kernel(const __grid_constant__ ReconstructParams p, const float* distances,
                       const int32_t* ids) {
  const int lane = threadIdx.x % kWarpSize, k = static_cast<int>(p.k);
  const int64_t token = int64_t{blockIdx.x} * kReconstructWarps + threadIdx.x / kWarpSize;
  if (token >= p.tokens) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int64_t row = b * p.tokens + token;
    int32_t* const index = p.index + row * k;
    float* const weight = p.weight + row * k;
    write_list(p, distances + row * k, ids + row * k, index, weight);
    const T* const values = static_cast<const T*>(p.values) + b * p.values_batch;
    for (int64_t c = lane * kVector; c < p.value_channels; c += kWarpSize * kVector) {
      float sum[kVector] = {}, x[kVector];
#pragma unroll 4
      for (int j = 0; j < k; ++j) {
        const float w = weight[j];
        load_floats(x, values + index[j] * p.values_row + c);
#pragma unroll
        for (int v = 0; v < kVector; ++v) sum[v] = fmaf(w, x[v], sum[v]);
      }
      store_floats(static_cast<T*>(p.out) + row * p.value_channels + c, sum);
    }
  }
}

// Grid: centroids, sequences. One warp per centroid.
template <typename T, int kVector>
__global__ void __launch_bounds__(kReconstructThreads)
    reconstruct_backward_kernel(const __grid_constant__ ReconstructBackwardParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t m = int64_t{blockIdx.x} * kReconstructWarps + threadIdx.x / kWarpSize;
  if (m >= p.clusters) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int32_t* const offsets = p.offsets + b * (p.clusters + 1) + m;
    const int32_t* const listed = p.listed + b * p.tokens * p.k;
    const int begin = offsets[0], end = offsets[1];
    const T* const dout = static_cast<const T*>(p.dout) + b * p.dout_batch;
    T* const to = static_cast<T*>(p.dvalues) + (b * p.clusters + m) * p.value_channels;
#pragma unroll 1
    for (int64_t first = 0; first < p.value_channels; first += kWarpSize * kVector) {
      const int64_t c = first + lane * kVector;
      float sum[kVector] = {}, d[kVector] = {};
#pragma unroll 1
      for (int chunk = begin; chunk < end; chunk += kWarpSize) {
        // Each lane looks up the weight of one token; then all lanes add the tokens one by one.
        const bool exists = chunk + lane < end;
        const int32_t own = exists ? listed[chunk + lane] : 0;
        const float weight = exists ? p.weight_of(b, own, m) : 0;
        const int count = end - chunk < kWarpSize ? end - chunk : kWarpSize;
        for (int i = 0; i < count; ++i) {
          const int32_t token = __shfl_sync(kFullWarp, own, i);
          const float w = __shfl_sync(kFullWarp, weight, i);
          if (c < p.value_channels) load_floats(d, dout + token * p.dout_row + c);
#pragma unroll
          for (int v = 0; v < kVector; ++v) sum[v] = fmaf(w, d[v], sum[v]);
        }
      }
      if (c < p.value_channels) store_floats(to + c, sum);
    }
  }
}

}  // namespace tokenmill::cuda::reconstruct_tokens
