// Scores of wide heads, of which latent caches have one: the warps of a block, which share the
// columns of values, share the head dimension too.
#pragma once
#include "cuda/attention/qk.cuh"

namespace tokenmill::cuda {

// s = 16 rows of queries x keys, by kWarps warps of which each multiplies its slices of both and
// leaves the products at `exchange`, kWarps KiB of shared memory for two key tiles. All threads of
// the block together; another synchronisation comes before the next call.
template <typename T, int kWarps, typename Shape, int kKeyTiles, typename Addresses>
__device__ __forceinline__ void multiply_shares(float (&s)[kKeyTiles][4], Addresses at,
                                                SharedQueries<Shape> queries, uint32_t exchange) {
  constexpr int kPatterns = Addresses::kKeys, kParts = Shape::kSlices / kPatterns;
  static_assert(Shape::kSlices % kPatterns == 0);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first = warp * kParts / kWarps, last = (warp + 1) * kParts / kWarps;
  auto& tile = reinterpret_cast<float (&)[1][kKeyTiles][4]>(s);
  clear(tile);
#pragma unroll
  for (uint32_t& address : at.key) address += first * kPatterns * 64;
#pragma unroll
  for (uint32_t& address : queries.at) address += first * kPatterns * 64;
#pragma unroll 1
  for (int i = first; i < last; ++i) {
    unroll<kPatterns>([&](auto j) {
      multiply_slice<T, 0, j>(tile, at, [&](int) { return queries.template load<j>(); });
    });
#pragma unroll
    for (uint32_t& address : at.key) address += kPatterns * 64;
    queries.advance();
  }
  exchange += lane * 16;
  unroll<kKeyTiles>([&](auto n) {
    store_floats<n * kWarps * kWarpSize * 16>(exchange + warp * kWarpSize * 16, s[n]);
  });
  __syncthreads();
  clear(tile);
  unroll<kKeyTiles>([&](auto n) {
    unroll<kWarps>([&](auto w) {
      float part[4];
      load_floats<(n * kWarps + w) * kWarpSize * 16>(part, exchange);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] += part[i];
    });
  });
}

}  // namespace tokenmill::cuda
