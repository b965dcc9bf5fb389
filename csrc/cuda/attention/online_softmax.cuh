// Softmax weights of one warp, made while the largest exponent of each row is not yet known.
#pragma once
#include "cuda/attention/pv.cuh"

namespace tokenmill::cuda {

// Softmax weights are relative to row_max, the largest exponent of their row at the time when it
// last moved: it does so when a weight exceeds 2^kHeadroom. Rescaling is rare, and the only key of
// a row has weight 1.
constexpr float kHeadroom = 8;

// Softmax weights relative to row_max of row tiles kFirst and on, and their sums. True, warp by
// warp, if one may exceed 2^8, the headroom.
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

}  // namespace tokenmill::cuda
