// Postprocess kernel of the backward: sums over all pairs.
#pragma once
#include "attention/backward_shape.cuh"

namespace tokenmill::cuda {

constexpr int kSumThreads = 256;

// Sum of x over all threads, in a fixed order.
__device__ inline double block_sum(double x) {
  __shared__ double sums[kSumThreads];
  __syncthreads();  // the previous sum has been read
  sums[threadIdx.x] = x;
  for (int n = kSumThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
  }
  __syncthreads();
  return sums[0];
}

// dscore_bias, dalibi_slopes and dsink of one head of one sequence. step: rows per entry of sums.
// For softmax a row of dS adds up to dlse + P_sink delta, and dscore_bias is taken from that: the
// sum itself cancels, down to the errors of P and dP.
static __global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const __grid_constant__ BackwardArgs args, int step) {
  const AttentionBackwardParams& bp = args.p;
  const AttentionParams& p = bp.forward;
  const int64_t batch = blockIdx.x / p.heads, h = blockIdx.x % p.heads;
  PackedRows queries{0, static_cast<int>(p.seqlen_q)};
  if (p.cu_seqlens_q) queries = rows_of_sequence(p.cu_seqlens_q, p.batch, p.seqlen_q, batch);
  const Sequence s = sequence_of(p, batch, queries);
  if (bp.sums) {
    double bias = 0, slope = 0;
    const float* sums = bp.sums + 2 * sums_offset(args, batch, s.q_start, h);
    for (int64_t i = threadIdx.x * int64_t(step); i < s.q_length;
         i += kSumThreads * int64_t(step)) {
      bias += sums[i / 16 * 2];
      slope += sums[i / 16 * 2 + 1];
    }
    bias = block_sum(bias);
    slope = block_sum(slope);
    if (threadIdx.x == 0) {
      if (bp.dscore_bias && p.map != ScoreMap::softmax)
        bp.dscore_bias[blockIdx.x] = static_cast<float>(bias);
      if (bp.dalibi_slopes) bp.dalibi_slopes[blockIdx.x] = static_cast<float>(slope);
    }
  }
  if (p.map == ScoreMap::softmax && (bp.dsink || bp.dscore_bias)) {
    // The sink has no value: its dP is 0.
    double sink = 0, bias = 0;
    const float* lse = lse_at(p, p.lse, batch, s.q_start, h);
    const float* minus_delta = lse_at(p, bp.minus_delta, batch, s.q_start, h);
    const float* dlse = bp.dlse ? lse_at(p, bp.dlse, batch, s.q_start, h) : nullptr;
    for (int64_t i = threadIdx.x; i < s.q_length; i += kSumThreads) {
      if (lse[i] == -infinity()) continue;
      if (p.sink) {
        // equality covers inf
        const float weight = p.sink[h] == lse[i] ? 1.f : expf(p.sink[h] - lse[i]);
        sink += static_cast<double>(weight) * minus_delta[i];
      }
      if (dlse) bias += dlse[i];
      if (lse[i] != lse[i]) bias += lse[i];  // NaN
    }
    sink = block_sum(sink);
    bias = block_sum(bias);
    if (threadIdx.x == 0) {
      if (bp.dsink) bp.dsink[blockIdx.x] = static_cast<float>(sink);
      if (bp.dscore_bias) bp.dscore_bias[blockIdx.x] = static_cast<float>(bias - sink);
    }
  }
}

}  // namespace tokenmill::cuda
