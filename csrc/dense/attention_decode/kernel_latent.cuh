// Scores of wide heads (latent caches): the warps of a CTA, which share the columns of V, split the
// head dimension too.
#pragma once
#include "attention/qk.cuh"

namespace tokenmill::cuda {

// S = Q K^T for 16 rows: each of kWarps warps multiplies its slices of Q and K and leaves its
// partial product at `exchange`, kWarps KiB of shared memory for two key tiles; all warps sum them.
// Called by all threads of the CTA; another synchronisation must precede the next call.
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
