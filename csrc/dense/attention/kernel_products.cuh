// The products of a warp of the forward with a step of keys in shared memory.
#pragma once
#include "cuda/mma.cuh"
#include "cuda/unroll.cuh"

namespace tokenmill::cuda {

// s[m] += queries x keys, over slice kSlice of the dimensions; query(m) is the slice of row tile m.
template <typename T, int kOffset, int kSlice, int kCount, int kKeyTiles, typename Addresses,
          typename Query>
__device__ __forceinline__ void multiply_slice(float (&s)[kCount][kKeyTiles][4],
                                               const Addresses& at, const Query& query) {
  Fragment<T, 4> a[kCount][2];
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    const auto slice = query(m);
    const auto& w = slice.words;
#pragma unroll
    for (int u = 0; u < 2; ++u)
      a[m][u] = make_fragment<T>(w[0][2 * u], w[1][2 * u], w[0][2 * u + 1], w[1][2 * u + 1]);
  }
  unroll<kKeyTiles>([&](auto n) {
    uint32_t w[4];
    at.template load_keys<kOffset + 8 * n, kSlice>(w);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const auto b = make_fragment<T>(w[2 * u], w[2 * u + 1]);
#pragma unroll
      for (int m = 0; m < kCount; ++m) mma(s[m][n], a[m][u], b);
    }
  });
}

// out[kFirst + m] += weights p[m] x values. before(pair) comes before the values of 16 columns.
template <typename T, int kFirst, int kOffset, int kRowTiles, int kTiles, int kCount, int kBlocks,
          typename Addresses, typename Before>
__device__ __forceinline__ void multiply_values(float (&out)[kRowTiles][kTiles][4],
                                                const Fragment<T, 4> (&p)[kCount][kBlocks],
                                                const Addresses& at, const Before& before) {
  constexpr int kDepth = kMmaDepth<T>;
  unroll<kBlocks>([&](auto k) {
    if constexpr (sizeof(T) == 4) {
      unroll<kTiles / 4>([&](auto group) {
        uint32_t even[4], odd[4];
        at.template load_float_values<kOffset + kDepth * k, 0, group>(even);
        at.template load_float_values<kOffset + kDepth * k, 1, group>(odd);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const auto b = make_fragment<T>(even[t], odd[t]);
#pragma unroll
          for (int m = 0; m < kCount; ++m) mma(out[kFirst + m][4 * group + t], p[m][k], b);
        }
      });
    } else {
      unroll<kTiles / 2>([&](auto pair) {
        before(pair);
        uint32_t w[4];
        at.template load_values<kOffset + kDepth * k, pair>(w);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const auto b = make_fragment<T>(w[2 * t], w[2 * t + 1]);
#pragma unroll
          for (int m = 0; m < kCount; ++m) mma(out[kFirst + m][2 * pair + t], p[m][k], b);
        }
      });
    }
  });
}

}  // namespace tokenmill::cuda
