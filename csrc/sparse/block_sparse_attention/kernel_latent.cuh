// Latent heads: each query is a request of sparse_decode_attention. A CTA has up to 16 heads that
// share a list; the CTAs of one list are adjacent in the grid, so that they share keys in L2.
#pragma once
#include "sparse/block_sparse_attention/latent.h"
#include "sparse/sparse_decode_attention/kernel.cuh"

namespace tokenmill::cuda::block_sparse_attention {

struct LatentLaunch : sparse_decode_attention::ListedLaunch<LatentBlockSparse> {};

template <typename T>
using LatentKeys = sparse_decode_attention::ListedKeys<T, kLatentBucket, T, LatentLaunch>;

// If the CTA's packed query belongs to no request, returns true; the first CTA of the query writes
// an empty row.
template <typename T>
__device__ __forceinline__ bool fill_loose_query(const LatentLaunch& d, const DecodePlan& plan) {
  if (!d.cu_seqlens_q) return false;
  const AttentionParams& p = d.attention;
  const int64_t blocks = d.row_heads() * plan.row_tiles * plan.splits;
  const int64_t n = blockIdx.x / blocks;
  if (d.requests[n] >= 0) return false;
  if (blockIdx.x % blocks > 0) return true;
  for (int64_t h = threadIdx.x; h < p.heads; h += kDecodeThreads)
    p.lse[d.lse_at(n, 0, h)] = -infinity();
#pragma unroll 1
  for (int64_t h = 0; h < p.heads; ++h) {
    T* const out = rows_at<T>(p.out, 0, n, h);
    for (int c = threadIdx.x; c < p.value_dim; c += kDecodeThreads) out[c] = static_cast<T>(0.f);
  }
  return true;
}

template <typename T>
__global__ void __launch_bounds__(kDecodeThreads)
    block_sparse_latent_kernel(const __grid_constant__ LatentLaunch d,
                               const __grid_constant__ DecodePlan plan) {
  if (!fill_loose_query<T>(d, plan)) sparse_decode_attention::run_listed<LatentKeys<T>>(d, plan);
}

}  // namespace tokenmill::cuda::block_sparse_attention
