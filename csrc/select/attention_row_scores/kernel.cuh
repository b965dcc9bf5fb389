// Few query rows against all keys, in three kernels: exponents (keys are read once), row_max and
// row_sum, results per key.
#pragma once
#include "cuda/load_tile.cuh"
#include "cuda/math.cuh"
#include "cuda/sequences.cuh"
#include "cuda/warp.cuh"
#include "select/attention_row_scores/params.h"

namespace tokenmill::cuda::attention_row_scores {

constexpr int kRowThreads = 256;
constexpr int kKeyLanes = 8;                          // lanes per key
constexpr int kKeysAtOnce = kRowThreads / kKeyLanes;  // keys per CTA and step
constexpr int kBlockKeys = 4 * kKeysAtOnce;
constexpr int kRowsAtOnce = kKeyLanes;  // each lane ends with the sum of one row
constexpr int kNowhere = 0x7fffffff;    // larger than any key index

// Sums over 8 lanes of 8 numbers: lane l gets the sum of number l.
__device__ __forceinline__ float transposed_sum(float (&x)[kRowsAtOnce], int lane) {
#pragma unroll
  for (int step = kKeyLanes / 2; step > 0; step /= 2)
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const bool high = lane & step;
      const float sent = high ? x[i] : x[i + step], kept = high ? x[i + step] : x[i];
      x[i] = kept + __shfl_xor_sync(kFullWarp, sent, step);
    }
  return x[0];
}

// Offset of 4 columns of a query row: columns read by different lanes at once are adjacent.
template <int kBucket, int kCount>
__device__ __forceinline__ int query_slot(int column) {
  return (column % kCount / 4 * (kBucket / kCount) + column / kCount) * 4;
}

// A CTA owns keys of one head, and processes the rows of its GQA group 8 at a time. Without a
// minimum number of CTAs ptxas spills a few bytes to fit one more.
template <typename T, int kBucket>
__global__ void __launch_bounds__(kRowThreads, 2)
    row_exponents_kernel(const __grid_constant__ RowScoresParams p, unsigned blocks, bool aligned) {
  constexpr int kCount = kChunkBytes / sizeof(T);
  constexpr int kChunks = kBucket / kCount / kKeyLanes;  // per lane
  __shared__ __align__(16) float queries[kRowsAtOnce][kBucket];
  const int first = static_cast<int>(blockIdx.x % blocks) * kBlockKeys;
  const int64_t in_batch = blockIdx.x / blocks, b = in_batch / p.kv_heads;
  const int64_t kv_head = in_batch % p.kv_heads;
  const int length = static_cast<int>(p.length(b));
  if (first >= length) return;
  const int group = static_cast<int>(p.heads / p.kv_heads), rows = group * static_cast<int>(p.rows);
  const int dim = static_cast<int>(p.head_dim), lane = threadIdx.x % kKeyLanes;
  const T* keys = rows_at<T>(p.k, b, 0, kv_head);
  const float factor = p.factor(kLog2e);
  for (int row0 = 0; row0 < rows; row0 += kRowsAtOnce) {
    const int count = min(rows - row0, kRowsAtOnce);
    __syncthreads();
    for (int i = threadIdx.x; i < count * kBucket; i += kRowThreads) {
      const int row = row0 + i / kBucket, column = i % kBucket;
      const T* q = rows_at<T>(p.q, b, row % p.rows, kv_head * group + row / p.rows);
      queries[i / kBucket][query_slot<kBucket, kCount>(column) + column % 4] =
          column < dim ? static_cast<float>(q[column]) : 0.f;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kBlockKeys; i += kKeysAtOnce) {
      const int key = first + i + static_cast<int>(threadIdx.x) / kKeyLanes;
      const T* from = keys + static_cast<int64_t>(min(key, length - 1)) * p.k.seq;
      float sums[kRowsAtOnce] = {};
#pragma unroll 2
      for (int c = 0; c < kChunks; ++c) {
        const int column = (c * kKeyLanes + lane) * kCount;
        uint32_t words[4] = {};
        if (!aligned)
          load_elements(words, from, column, dim);
        else if (column < dim)
          reinterpret_cast<uint4&>(words) = *reinterpret_cast<const uint4*>(from + column);
        float x[kCount];
        load_floats(x, reinterpret_cast<const T*>(words));
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r)
          if (r < count) {
#pragma unroll
            for (int e = 0; e < kCount; e += 4) {
              const float4 q = *reinterpret_cast<const float4*>(
                  &queries[r][query_slot<kBucket, kCount>(column + e)]);
              sums[r] = fmaf(q.x, x[e], sums[r]);
              sums[r] = fmaf(q.y, x[e + 1], sums[r]);
              sums[r] = fmaf(q.z, x[e + 2], sums[r]);
              sums[r] = fmaf(q.w, x[e + 3], sums[r]);
            }
          }
      }
      const float sum = transposed_sum(sums, lane);
      if (lane < count && key < length) {
        const int64_t row = b * p.heads * p.rows + kv_head * rows + row0 + lane;
        p.exponents[row * p.seqlen_k + key] = sum * factor;
      }
    }
  }
}

// row_max and weight of each row: P = 2^(t - row_max) weight.
__global__ void __launch_bounds__(kRowThreads)
    row_weights_kernel(const __grid_constant__ RowScoresParams p) {
  __shared__ float tops[kRowThreads / kWarpSize], sums[kRowThreads / kWarpSize];
  const int64_t row = blockIdx.x, bh = row / p.rows, b = bh / p.heads;
  const int end = static_cast<int>(p.end(row % p.rows, p.length(b)));
  auto* to = reinterpret_cast<float2*>(p.statistics) + row;
  if (p.lse) {
    const float lse = p.lse[b * p.lse_batch + bh % p.heads * p.lse_head + row % p.rows];
    // no exponent exceeds +inf: P = 0
    if (threadIdx.x == 0)
      *to = lse == -infinity() ? float2{infinity(), 0} : float2{lse * kLog2e, 1};
    return;
  }
  const float* t = p.exponents + row * p.seqlen_k;
  float top = -kFloatMax, sum = 0;
  for (int j = threadIdx.x; j < end; j += kRowThreads) top = fmaxf(top, t[j]);
  top = warp_max(top);
  if (threadIdx.x % kWarpSize == 0) tops[threadIdx.x / kWarpSize] = top;
  __syncthreads();
  for (float other : tops) top = fmaxf(top, other);
  for (int j = threadIdx.x; j < end; j += kRowThreads) sum += exp2_approx(t[j] - top);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0;
  for (float other : sums) sum += other;
  *to = sum == 0 ? float2{infinity(), 0} : float2{top, 1 / sum};
}

// One CTA per row: position of its largest exponent, the first of equal ones. NaN counts as +inf.
__global__ void __launch_bounds__(kRowThreads)
    row_argmax_kernel(const __grid_constant__ RowScoresParams p) {
  __shared__ float tops[kRowThreads / kWarpSize];
  __shared__ int places[kRowThreads / kWarpSize];
  const int64_t row = blockIdx.x, r = row % p.rows, bh = row / p.rows, b = bh / p.heads;
  const bool nothing = p.gives_nothing(b, bh % p.heads, r);
  const int end = nothing ? 0 : static_cast<int>(p.end(r, p.length(b)));
  const float* t = p.exponents + row * p.seqlen_k;
  float top = -infinity();
  int place = kNowhere;
  const auto take = [&](float x, int j) {
    if (x > top || (x == top && j < place)) top = x, place = j;
  };
  for (int j = static_cast<int>(p.skip) + threadIdx.x; j < end; j += kRowThreads)
    take(t[j] == t[j] ? t[j] : infinity(), j);
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2)
    take(__shfl_xor_sync(kFullWarp, top, step), __shfl_xor_sync(kFullWarp, place, step));
  if (threadIdx.x % kWarpSize == 0) {
    tops[threadIdx.x / kWarpSize] = top;
    places[threadIdx.x / kWarpSize] = place;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 0; warp < kRowThreads / kWarpSize; ++warp) take(tops[warp], places[warp]);
  p.largest[row] = place == kNowhere ? -1 : place;
}

// One thread per key of a request or, with RowReduce::none, per key of a row.
__global__ void __launch_bounds__(kRowThreads)
    reduce_rows_kernel(const __grid_constant__ RowScoresParams p) {
  const bool apart = p.reduce == RowReduce::none;
  const int64_t all = p.heads * p.rows, wanted = p.seqlen_k - p.skip;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (at >= p.batch * wanted * (apart ? all : 1)) return;
  const int64_t j = p.skip + at % wanted, outer = at / wanted;
  const int64_t first = apart ? outer : outer * all, b = first / all, length = p.length(b);
  float score = 0;
  for (int64_t row = first; row < first + (apart ? 1 : all); ++row) {
    float w = 0;
    if (j < p.end(row % p.rows, length)) {
      const float2 statistic = reinterpret_cast<const float2*>(p.statistics)[row];
      w = exp2_approx(p.exponents[row * p.seqlen_k + j] - statistic.x) * statistic.y;
    }
    if (p.reduce == RowReduce::max)
      score = w > score || w != w ? w : score;
    else
      score += w;
  }
  p.out[at] = p.reduce == RowReduce::mean ? score / static_cast<float>(all) : score;
}

}  // namespace tokenmill::cuda::attention_row_scores
