// S = Q K^T for one warp and a step of keys in shared memory.
#pragma once
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/arch/shared_memory.cuh"
#include "cuda/unroll.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

// 16 bytes of rows g and g + 8 of Q.
struct QuerySlice {
  uint32_t words[2][4];
};

// s[m] += Q K^T over head_dim slice kSlice; query(m): that slice of row tile m.
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

template <int kCount, int kKeyTiles>
__device__ __forceinline__ void clear(float (&s)[kCount][kKeyTiles][4]) {
#pragma unroll
  for (int m = 0; m < kCount; ++m)
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
}

// s = Q K^T with Q in registers, keys from kOffset on; query(m, Index<j>): slice j of row tile m.
template <typename T, int kSlices, int kOffset, int kCount, int kKeyTiles, typename Addresses,
          typename Query>
__device__ __forceinline__ void multiply_held(float (&s)[kCount][kKeyTiles][4], const Addresses& at,
                                              const Query& query) {
  clear(s);
  unroll<kSlices>(
      [&](auto j) { multiply_slice<T, kOffset, j>(s, at, [&](int m) { return query(m, j); }); });
}

// s = Q K^T with Q loaded at each use; load(m, Index<j>, i): slice i + j of row tile m, i a
// multiple of the swizzle's patterns; advance() follows each i. Not unrolled: the loads would run
// far ahead, and spill.
template <typename T, int kSlices, int kOffset, int kCount, int kKeyTiles, typename Addresses,
          typename Load, typename Advance>
__device__ __forceinline__ void multiply_loaded(float (&s)[kCount][kKeyTiles][4], Addresses at,
                                                const Load& load, const Advance& advance) {
  constexpr int kPatterns = Addresses::kKeys;
  clear(s);
#pragma unroll 1
  for (int i = 0; i < kSlices; i += kPatterns) {
    unroll<kPatterns>([&](auto j) {
      multiply_slice<T, kOffset, j>(s, at, [&](int m) { return load(m, j, i); });
    });
#pragma unroll
    for (uint32_t& address : at.key) address += kPatterns * 64;
    advance();
  }
}

// 16 rows of Q in shared memory, and the addresses of this lane's slices.
template <typename Shape>
struct SharedQueries {
  static constexpr int kPatterns = Shape::KeyTile::kSwizzledChunks / 4;
  uint32_t at[kPatterns];

  __device__ __forceinline__ void find(uint32_t rows, int lane) {
#pragma unroll
    for (int i = 0; i < kPatterns; ++i)
      at[i] = rows + Shape::KeyTile::offset(lane / 4, 4 * i + lane % 4);
  }

  template <int kSlice>
  __device__ __forceinline__ QuerySlice load() const {
    constexpr int kOffset = kSlice / kPatterns * kPatterns * 64;
    QuerySlice slice;
    load_shared<kOffset>(slice.words[0], at[kSlice % kPatterns]);
    load_shared<kOffset + 8 * Shape::kRowBytes>(slice.words[1], at[kSlice % kPatterns]);
    return slice;
  }
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (uint32_t& address : at) address += kPatterns * 64;
  }
};

// s = Q K^T with Q in shared memory.
template <typename T, int kOffset, typename Shape, int kCount, int kKeyTiles, typename Addresses>
__device__ __forceinline__ void multiply_shared(float (&s)[kCount][kKeyTiles][4],
                                                const Addresses& at, SharedQueries<Shape> queries) {
  multiply_loaded<T, Shape::kSlices, kOffset>(
      s, at, [&](int, auto j, int) { return queries.template load<j>(); },
      [&] { queries.advance(); });
}

}  // namespace tokenmill::cuda
