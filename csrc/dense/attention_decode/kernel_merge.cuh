// Partial results of one output tile, merged in a fixed order: over the warps of a CTA, and over
// segments of several CTAs.
#pragma once
#include "attention/epilogue.cuh"
#include "attention/pair_mask.cuh"
#include "dense/attention_decode/kernel_shape.cuh"

namespace tokenmill::cuda {

// Sums of one row; a lane has columns lane, lane + 32, ...
template <typename Shape>
struct RowSums {
  static constexpr int kColumns = Shape::kValueBucket / kWarpSize;
  float value[kColumns];
  float sum, row_max;

  // Merges parts 0 .. count - 1; row_of(n) is the row of part n.
  template <typename RowOf>
  __device__ __forceinline__ RowSums(int count, bool softmax, const RowOf& row_of) : sum(0) {
    const int lane = threadIdx.x % kWarpSize;
    // Part 0 may be in another state space than the others, so loads are generic: __ldcg cannot be
    // used. No row was in this SM's L1 cache before it was written.
    row_max = -kFloatMax;
    for (int n = 0; softmax && n < count; ++n)
      row_max = fmaxf(row_max, row_of(n)[Shape::kRowMaxAt]);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) value[i] = 0;
    for (int n = 0; n < count; ++n) {
      const float* row = row_of(n);
      const float own = row[Shape::kRowMaxAt];
      const float factor = softmax && own != row_max ? exp2_approx(own - row_max) : 1;
      sum = fmaf(row[Shape::kSumAt], factor, sum);
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        value[i] = fmaf(row[lane + i * kWarpSize], factor, value[i]);
    }
  }

  __device__ __forceinline__ void store(float* row) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) row[lane + i * kWarpSize] = value[i];
    if (lane == 0) row[Shape::kSumAt] = sum, row[Shape::kRowMaxAt] = row_max;
  }
};

// Number of keys of its band that query i sees. Called by all lanes of a warp.
__device__ __forceinline__ float seen_keys(const AttentionParams& p, int b, int h, int i,
                                           const Band& band) {
  int count = 0;
#pragma unroll 1
  for (int key = static_cast<int>(band.begin(i)) + threadIdx.x % kWarpSize; key < band.end(i);
       key += kWarpSize)
    count += sees_pair(p.mask, b, h, i, key, key);
  return static_cast<float>(warp_sum(count));
}

// Normalises and stores row `row` of an output tile.
template <typename T, bool kMasked, typename Params, typename Shape>
__device__ __forceinline__ void store_result(const Params& d, const DecodePlan& plan,
                                             const Segment& s, int row,
                                             const RowSums<Shape>& sums) {
  const AttentionParams& p = d.attention;
  const int lane = threadIdx.x % kWarpSize;
  const int in_head = s.row_tile * plan.tile_rows + row;
  const int i = in_head / plan.group, h = s.h * plan.group + in_head % plan.group;
  float factor = 1 / scale_of<T>(p.map);
  if (p.map == ScoreMap::softmax) {
    const float shift = constant_of(p, s.b, h, static_cast<int>(d.length(s.b)));
    const RowScale scale =
        softmax_epilogue(sums.sum, sums.row_max, p.sink ? p.sink + h : nullptr, shift);
    if (lane == 0) p.lse[d.lse_at(s.b, i, h)] = scale.lse;
    factor = scale.factor;
  } else if (p.normalize != Normalize::none) {
    const Band band = decode_band(p, p.seqlen_q, d.length(s.b));
    float statistic = p.normalize == Normalize::sum
                          ? sums.sum * factor
                          : static_cast<float>(max(band.end(i) - band.begin(i), int64_t{0}));
    if constexpr (kMasked)
      if (p.normalize == Normalize::count) statistic = seen_keys(p, s.b, h, i, band);
    if (lane == 0) p.lse[d.lse_at(s.b, i, h)] = statistic;
    factor *= inverse_of_row(p.map, p.normalize, statistic);
  }
  const QueryPlace at = d.place(s.b, i);
  T* out = rows_at<T>(p.out, at.b, at.i, h);
#pragma unroll
  for (int c = 0; c < sums.kColumns; ++c) {
    const int column = lane + c * kWarpSize;
    if (column < p.value_dim) out[column] = static_cast<T>(sums.value[c] * factor);
  }
}

// Slot of a segment's partial sums. A stream-K CTA has two: one for an output tile that it did not
// begin (its first), one for tiles that it did.
__device__ __forceinline__ int64_t slot_of(const DecodePlan& plan, const Segment& s, int part) {
  const int64_t block = s.first_block + part;
  return plan.splits > 0 ? block : 2 * block + (part == 0);
}

}  // namespace tokenmill::cuda
