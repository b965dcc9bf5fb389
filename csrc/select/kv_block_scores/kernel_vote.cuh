// Sum over heads of the softmax of their scores, which are in global memory: row_max and row_sum of
// pieces of a row, then the vote.
#pragma once
#include "cuda/math.cuh"
#include "cuda/warp.cuh"
#include "select/kv_block_scores/params.h"

namespace tokenmill::cuda::kv_block_scores {

constexpr int kVoteThreads = 256;
constexpr int kVoteEach = 16;  // scores per thread and piece
constexpr int kVotePiece = kVoteThreads * kVoteEach;
constexpr int kVoteColumns = kVoteThreads;  // per CTA
constexpr int kVoteHeads = 64;              // at a time

// Piece of a row: maximum in log2 units, and sum of powers of two relative to it.
struct VotePart {
  float maximum, sum;
};

// Reduction over the CTA; NaN is ignored.
template <bool kMax>
__device__ __forceinline__ float block_reduce(float x) {
  __shared__ float parts[kVoteThreads / kWarpSize];
  x = kMax ? warp_max(x) : warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  float y = parts[0];
#pragma unroll
  for (int i = 1; i < kVoteThreads / kWarpSize; ++i) y = kMax ? fmaxf(y, parts[i]) : y + parts[i];
  return y;
}

// blockIdx.x: row of scores [B, H, rows], piece
__global__ void __launch_bounds__(kVoteThreads, 4)
    vote_parts_kernel(const __grid_constant__ BlockScoreParams p, VotePart* parts, int pieces) {
  const int64_t row = blockIdx.x / static_cast<unsigned>(pieces);
  const int64_t first = int64_t{blockIdx.x % static_cast<unsigned>(pieces)} * kVotePiece;
  const float* const z = p.scores + row * p.blocks + first;
  const int64_t count = p.blocks - first;
  float t[kVoteEach], maximum = -infinity();
#pragma unroll
  for (int i = 0; i < kVoteEach; ++i) {
    const int at = i * kVoteThreads + threadIdx.x;
    t[i] = at < count ? kLog2e * z[at] : -infinity();
    maximum = fmaxf(maximum, t[i]);
  }
  maximum = block_reduce<true>(maximum);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kVoteEach; ++i) {
    const float e = exp2_approx(t[i] - maximum);
    sum += e == e ? e : 0;
  }
  sum = block_reduce<false>(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = {maximum, sum};
}

// blockIdx.x: b, row, piece of the key blocks
__global__ void __launch_bounds__(kVoteThreads, 4)
    vote_kernel(const __grid_constant__ BlockScoreParams p, const VotePart* parts, int pieces,
                int column_pieces) {
  __shared__ float lse[kVoteHeads];  // log2 units
  const int64_t place = blockIdx.x / static_cast<unsigned>(column_pieces);
  const int64_t b = place / p.rows, row = place % p.rows;
  const int64_t column =
      int64_t{blockIdx.x % static_cast<unsigned>(column_pieces)} * kVoteColumns + threadIdx.x;
  const int lane = threadIdx.x % kWarpSize;
  float vote = 0;
#pragma unroll 1
  for (int64_t first = 0; first < p.heads; first += kVoteHeads) {
    const int heads = static_cast<int>(min(p.heads - first, int64_t{kVoteHeads}));
    __syncthreads();
    for (int h = threadIdx.x / kWarpSize; h < heads; h += kVoteThreads / kWarpSize) {
      const VotePart* const own = parts + ((b * p.heads + first + h) * p.rows + row) * pieces;
      float maximum = -infinity(), sum = 0;
      for (int i = lane; i < pieces; i += kWarpSize) maximum = fmaxf(maximum, own[i].maximum);
      maximum = warp_max(maximum);
      for (int i = lane; i < pieces; i += kWarpSize)
        if (own[i].sum > 0) sum += own[i].sum * exp2_approx(own[i].maximum - maximum);
      sum = warp_sum(sum);
      if (lane == 0) lse[h] = sum > 0 ? maximum + log2_approx(sum) : maximum;
    }
    __syncthreads();
    if (column < p.blocks)
      for (int h = 0; h < heads; ++h) {
        const float z = p.scores[((b * p.heads + first + h) * p.rows + row) * p.blocks + column];
        vote += exp2_approx(kLog2e * z - lse[h]);
      }
  }
  if (column >= p.blocks) return;
  const SeenRows seen = seen_rows(p, tokens_of(p, b), last_query(p, row));
  const int64_t begin = column * p.block_rows, end = begin + p.block_rows;
  const bool sees = (seen.begin > begin ? seen.begin : begin) < (seen.end < end ? seen.end : end);
  p.out[place * p.blocks + column] = sees ? vote : -infinity();
}

}  // namespace tokenmill::cuda::kv_block_scores
