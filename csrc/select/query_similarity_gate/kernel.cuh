// One CTA per request.
#pragma once
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "select/query_similarity_gate/params.h"

namespace tokenmill::cuda::query_similarity_gate {

constexpr int kGateThreads = 256;
constexpr int kGateWarps = kGateThreads / kWarpSize;

// Sum over the tokens. The cosine does not depend on the norm of a vector.
template <typename T>
__device__ __forceinline__ float sum_tokens(const SimilarityGateParams& p, int which, int64_t b,
                                            int64_t h, int64_t d) {
  const Rows& r = p.rows[which];
  const T* from = static_cast<const T*>(r.data) + b * r.batch + h * r.head + d;
  float sum = 0;
#pragma unroll 4
  for (int64_t t = 0; t < p.lengths[which]; ++t, from += r.seq) sum += static_cast<float>(*from);
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kGateThreads)
    gate_kernel(const __grid_constant__ SimilarityGateParams p) {
  __shared__ float parts[3][kGateWarps];
  const int64_t b = blockIdx.x;
  float sums[3] = {};  // x y, x x and y y
  for (int64_t i = threadIdx.x; i < p.heads * p.head_dim; i += kGateThreads) {
    const int64_t h = i / p.head_dim, d = i % p.head_dim;
    const float x = sum_tokens<T>(p, 0, b, h, d), y = sum_tokens<T>(p, 1, b, h, d);
    sums[0] += x * y, sums[1] += x * x, sums[2] += y * y;
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    sums[i] = warp_sum(sums[i]);
    if (threadIdx.x % kWarpSize == 0) parts[i][threadIdx.x / kWarpSize] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    sums[i] = parts[i][0];
    for (int w = 1; w < kGateWarps; ++w) sums[i] += parts[i][w];
  }
  p.out[b] = sums[0] / (sqrtf(sums[1]) * sqrtf(sums[2])) >= p.threshold;
}

}  // namespace tokenmill::cuda::query_similarity_gate
