// Scores: products of rows of queries with a step of keys in shared memory, by one warp.
#pragma once
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/unroll.cuh"

namespace tokenmill::cuda {

// 16 bytes of rows g and g + 8.
struct QuerySlice {
  uint32_t words[2][4];
};

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

}  // namespace tokenmill::cuda
