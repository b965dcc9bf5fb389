// Online softmax of one warp.
#pragma once
#include "attention/pv.cuh"

namespace tokenmill::cuda {

// Lazy rescaling: row_max is the largest exponent of the row at the last update, and is updated
// only when a weight exceeds 2^kHeadroom. Rescaling is rare, and the only key of a row has weight
// 1.
constexpr float kHeadroom = 8;

// P = 2^(factor S - row_max) for row tiles from kFirst on, as fragments, and its row sums. True,
// warp by warp, if a weight may exceed 2^8, the headroom.
template <int kFirst, typename T, int kRowTiles, int kCount, int kKeyTiles, int kBlocks>
__device__ __forceinline__ bool exponentiate(const float (&s)[kCount][kKeyTiles][4], float factor,
                                             const float (&neg_row_max)[kRowTiles][2],
                                             Fragment<T, 4> (&p)[kCount][kBlocks],
                                             float (&sums)[kCount][2]) {
  float top = 0;
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    float e[kKeyTiles][4];
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        e[n][i] = exp2_approx(fmaf(s[m][n][i], factor, neg_row_max[kFirst + m][i / 2]));
    set_fragments(p[m], e);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sums[m][h] = e[0][2 * h] + e[0][2 * h + 1];
#pragma unroll
      for (int n = 1; n < kKeyTiles; ++n) sums[m][h] += e[n][2 * h] + e[n][2 * h + 1];
      top = fmaxf(top, sums[m][h]);
    }
  }
  return __any_sync(kFullWarp, top > 256);
}

// Rescales O and row_sum of row g (h = 0) or g + 8 (h = 1) of a row tile by `factor`.
template <int kTiles>
__device__ __forceinline__ void rescale(float (&out)[kTiles][4], float& sum, int h, float factor) {
  sum *= factor;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    out[n][2 * h] *= factor;
    out[n][2 * h + 1] *= factor;
  }
}

// Moves row_max of rows with weights above 2^kHeadroom to the new maximum and rescales their sums;
// each row decides by its own scores. kSkipsEmpty: rows without weights, whose sums are 0, are not
// rescaled.
template <int kFirst, bool kSkipsEmpty, int kRowTiles, int kTiles, int kCount, int kKeyTiles>
__device__ __forceinline__ void update_row_max(const float (&s)[kCount][kKeyTiles][4], float factor,
                                               float (&neg_row_max)[kRowTiles][2],
                                               float (&sum)[kRowTiles][2],
                                               float (&out)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -infinity();
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
        top = fmaxf(top, fmaxf(s[m][n][2 * h] * factor, s[m][n][2 * h + 1] * factor));
      top = quad_max(top);
      float& own = neg_row_max[kFirst + m][h];
      if (top + own > kHeadroom) {
        const bool summed = !kSkipsEmpty || own < kFloatMax;
        const float shrink = exp2_approx(-own - top);
        own = -top;
        if (summed) rescale(out[kFirst + m], sum[kFirst + m][h], h, shrink);
      }
    }
  }
}

// P of a step as A fragments of the P V product; updates row_sum. The loop makes the weights in one
// place, which needs their registers only once.
template <int kFirst, bool kSkipsEmpty, typename T, int kRowTiles, int kTiles, int kCount,
          int kKeyTiles, int kBlocks>
__device__ __forceinline__ void softmax_weights(const float (&s)[kCount][kKeyTiles][4],
                                                float factor, float (&neg_row_max)[kRowTiles][2],
                                                float (&sum)[kRowTiles][2],
                                                float (&out)[kRowTiles][kTiles][4],
                                                Fragment<T, 4> (&p)[kCount][kBlocks]) {
  float sums[kCount][2];
  int updated = 0;
#pragma unroll 1
  while (exponentiate<kFirst>(s, factor, neg_row_max, p, sums) && !updated) {
    update_row_max<kFirst, kSkipsEmpty>(s, factor, neg_row_max, sum, out);
    updated = 1;
    opt_barrier(updated);
  }
#pragma unroll
  for (int m = 0; m < kCount; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[kFirst + m][h] += sums[m][h];
}

}  // namespace tokenmill::cuda
