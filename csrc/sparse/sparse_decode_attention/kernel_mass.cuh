// Attention mass of each list entry, from the logits stored by the decode kernel.
#pragma once
#include "sparse/sparse_decode_attention/kernel_keys.cuh"

namespace tokenmill::cuda::sparse_decode_attention {

constexpr int kMassThreads = 128;  // maximum

// Entries per warp, at one key per lane.
inline int64_t mass_entries(int log2_block) { return log2_block < 5 ? kWarpSize >> log2_block : 1; }

// Sums the mass of each list entry: one warp for mass_entries() entries of one list head.
__global__ void __launch_bounds__(kMassThreads)
    sparse_mass_kernel(const __grid_constant__ SparseLaunch d, int rows, int64_t warps,
                       int64_t heads) {
  const int64_t warp = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarpSize;
  if (warp >= heads * warps) return;
  const AttentionParams& p = d.attention;
  const int64_t head = warp / warps, b = head / d.row_heads(), h = head % d.row_heads();
  const int lane = threadIdx.x % kWarpSize, log2_lanes = min(d.log2_block, 5);
  const int64_t entry = (warp % warps << (5 - log2_lanes)) + (lane >> log2_lanes);
  const int2 listed = d.listed[head];
  float sum = 0;
  if (entry >= listed.x && entry < listed.y) {
    const int64_t list_begin = KeyRow::Listed::of(d, b).begin;
    const int64_t first = list_begin % kLogitAlign + ((entry - listed.x) << d.log2_block);
    const float* logits = d.logits + head * rows * d.logit_row + first;
    const int64_t group = p.heads / d.row_heads();
    const float* lse = p.lse + (b * p.heads + h * group) * p.seqlen_q;
    for (int64_t i = 0; i < rows; ++i, logits += d.logit_row) {
      const float shift = -kLog2e * lse[i % group * p.seqlen_q + i / group];
      for (int key = lane & ((1 << log2_lanes) - 1); key < 1 << d.log2_block; key += kWarpSize) {
        const float x = logits[key];
        // for a row that sees no key, lse is -inf too
        sum += x == -infinity() ? 0 : exp2_approx(x + shift);
      }
    }
  }
  for (int offset = 1; offset < 1 << log2_lanes; offset *= 2)
    sum += __shfl_xor_sync(kFullWarp, sum, offset);
  if ((lane & ((1 << log2_lanes) - 1)) == 0 && entry < d.entries)
    d.mass[head * d.entries + entry] = sum;
}

}  // namespace tokenmill::cuda::sparse_decode_attention
