// Feature maps on tiles in shared memory, computed by all threads of a CTA.
#pragma once
#include "linear/linear_attention/kernel_products.cuh"

namespace tokenmill::cuda::linear_attention {

// Pair (i, j) of each taylor2 feature: x_i x_j, where x at kNoFeature is 1. Padding features have
// none.
constexpr uint8_t kPadding = 255;

template <int kTokens>
__device__ void list_features(SharedVectors<kTokens>& to, int dim) {
  for (int f = threadIdx.x; f < kMaxFeatures; f += blockDim.x) {
    int first = kNoFeature, second = kNoFeature;
    if (f >= 1 && f <= dim) first = f - 1;
    if (f > dim) {
      int rest = f - 1 - dim;
      for (first = 0; first < dim && rest >= dim - first; ++first) rest -= dim - first;
      second = first + rest;
      if (first == dim) first = kPadding;
    }
    to.first[f] = first;
    to.second[f] = second;
  }
}

// Features begin ... begin + 63 of n tokens, zero past them.
template <typename T, typename From, typename To, int kTokens>
__device__ void make_features(uint32_t to, uint32_t rows, const SharedVectors<kTokens>& vectors,
                              int begin, int n, bool factors, float scale) {
  const int lane = threadIdx.x % kWarpSize;
  int first[2], second[2];
  float factor[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int f = begin + 2 * lane + e;
    first[e] = f < kMaxFeatures ? vectors.first[f] : kPadding;
    second[e] = f < kMaxFeatures ? vectors.second[f] : kNoFeature;
    factor[e] = first[e] == kPadding ? 0 : 1;
    if (factors && first[e] < kNoFeature)
      factor[e] = second[e] == kNoFeature ? scale
                  : second[e] == first[e] ? scale * scale / 2
                                          : scale * scale;
  }
  for (int token = threadIdx.x / kWarpSize; token < kTokens; token += blockDim.x / kWarpSize) {
    float y[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const auto x = [&](int i) {
        if (i >= kNoFeature) return 1.f;
        const int byte = i * static_cast<int>(sizeof(T));
        return load_element<T>(rows + From::offset(token, byte / kChunkBytes) + byte % kChunkBytes);
      };
      y[e] = token < n ? factor[e] * (x(first[e]) * x(second[e])) : 0;
    }
    const int byte = 2 * lane * static_cast<int>(sizeof(T));
    const uint32_t at = to + To::offset(token, byte / kChunkBytes) + byte % kChunkBytes;
    if constexpr (sizeof(T) == 4) {
      store_shared(at, __float_as_uint(y[0]));
      store_shared<4>(at, __float_as_uint(y[1]));
    } else {
      store_shared(at, pack<T>(y[0], y[1]));
    }
  }
}

// Applies the map to a tile in place; elements past n rows and past the columns stay zero.
template <typename T, typename Tile, int kRows>
__device__ void map_tile(uint32_t tile, FeatureMap map, int n, int columns) {
  constexpr int kCount = kChunkBytes / sizeof(T);
#pragma unroll 1
  for (int i = threadIdx.x; i < n * Tile::kChunks; i += blockDim.x) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const uint32_t at = tile + Tile::offset(row, chunk);
    uint32_t words[4];
    load_shared(words, at);
    Pack<T, kCount>& pack = reinterpret_cast<Pack<T, kCount>&>(words);
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      pack.x[e] = static_cast<T>(
          chunk * kCount + e < columns ? map_feature(map, static_cast<float>(pack.x[e])) : 0.f);
    store_shared(at, words);
  }
}

// Applies the maps to a chunk of n tokens: queries (0: none), keys, and `columns` columns of V from
// `column` on, which follow the keys in the stage.
template <typename T, typename Shape>
__device__ __forceinline__ void map_chunk(const Recurrence& p, uint32_t queries, uint32_t keys,
                                          int columns, int column, int n) {
  using Tile = typename Shape::RowTile;
  if (p.q.map == FeatureMap::identity && p.k.map == FeatureMap::identity &&
      p.v.map == FeatureMap::identity)
    return;
  if (p.q.map != FeatureMap::identity && queries)
    map_tile<T, Tile, Shape::kTokens>(queries, p.q.map, n, p.q.dim);
  if (p.k.map != FeatureMap::identity) map_tile<T, Tile, Shape::kTokens>(keys, p.k.map, n, p.k.dim);
  if (p.v.map != FeatureMap::identity)
    for (int i = 0; i < columns; i += kSubtileColumns)
      map_tile<T, typename Shape::ValueTile, Shape::kTokens>(
          keys + Shape::kRowBytes + i / kSubtileColumns * Shape::kValueBytes, p.v.map, n,
          p.v.dim - column - i);
  __syncthreads();
}

}  // namespace tokenmill::cuda::linear_attention
