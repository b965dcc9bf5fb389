// Blocks of keys in tiles, and block statistics over the scores of a warp.
//
// The exponents t_j of an earlier block are shifted by l - log2 sum_j 2^t_j, over its ordinary keys
// j, with l the exponent of its landmark: after that, the operator is causal attention without
// landmarks.
#pragma once
#include "cuda/arch/opaque.cuh"
#include "cuda/math.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda::landmark_attention {

// A tile has whole blocks, or a part of one block that is longer than a tile. The key loop is a
// sequence of steps, one tile each; a long block that queries see through its landmark takes an
// extra pass over its tiles first, for its statistics.
struct KeyTiles {
  int tokens, block;  // block is at most tokens + 1
  int keys, parts;    // keys per tile, tiles per block

  __host__ __device__ static KeyTiles of(int64_t tokens, int64_t block, int maximum) {
    const int length = static_cast<int>(tokens);
    const int own = block <= length ? static_cast<int>(block) : length + 1;
    return {length, own, own <= maximum ? maximum / own * own : maximum,
            own <= maximum ? 1 : (own + maximum - 1) / maximum};
  }

  __host__ __device__ bool whole() const { return parts == 1; }
  __host__ __device__ int count() const {
    const int rest = whole() ? tokens : tokens % block;
    return (whole() ? 0 : tokens / block * parts) + (rest + keys - 1) / keys;
  }
  __device__ int first(int tile) const {
    return whole() ? tile * keys : tile / parts * block + tile % parts * keys;
  }
  __device__ int count_of(int tile) const {
    const int at = first(tile), end = whole() ? at + keys : (at / block + 1) * block;
    return min(min(end, tokens) - at, keys);
  }
  __device__ bool is_landmark(int key) const { return key % block == block - 1; }

  struct Step {
    int tile;
    bool search;
  };
  // Number of steps for queries up to `last`.
  __device__ int steps(int last) const {
    if (whole()) return last / keys + 1;
    return last / block * 2 * parts + last % block / keys + 1;
  }
  __device__ Step step(int n, int last) const {
    if (whole()) return {n, false};
    const int of_block = n / (2 * parts), part = n % (2 * parts);
    if (of_block == last / block) return {of_block * parts + part, false};
    return {of_block * parts + part % parts, part < parts};
  }
};

// Part of a block within a tile: columns [from, to) are its ordinary keys. Queries from `end` on
// see it through its landmark.
struct BlockColumns {
  int from, to, landmark, end;

  // Block n of the tile of `count` keys from `first` on.
  __device__ static BlockColumns of(const KeyTiles& tiles, int first, int count, int n) {
    const int begin = tiles.whole() ? n * tiles.block : 0;
    const int end = (first + begin) / tiles.block * tiles.block + tiles.block;
    const bool has_landmark = end - first <= count;
    return {begin, has_landmark ? end - first - 1 : count, has_landmark ? end - first - 1 : -1,
            end};
  }
  __device__ static int blocks(const KeyTiles& tiles, int count) {
    return tiles.whole() ? (count + tiles.block - 1) / tiles.block : 1;
  }

  __device__ bool has(int column) const { return column >= from && column < to; }
  // True if columns 8 n .. 8 n + 7 contain any of the block, including its landmark.
  __device__ bool meets(int n) const { return 8 * n + 7 >= from && 8 * n <= max(to, landmark); }
};

// Calls visit(n, i, column) for the elements of accumulators s[kTiles][4] that lie in a block;
// element i is in row g (i / 2 = 0) or g + 8.
template <int kTiles, typename Visit>
__device__ __forceinline__ void visit_block(const BlockColumns& block, const Visit& visit) {
  int c = threadIdx.x % 4;
  opt_barrier(c);  // columns are recomputed for each block to save registers
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (!block.meets(n)) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) visit(n, i, 8 * n + 2 * c + i % 2);
  }
}

// For rows g and g + 8: maximum exponent of the ordinary keys, sum of weights relative to it, sum
// of weights times dP, and exponent of the landmark.
struct BlockStatistics {
  float top[2], sum[2], mean[2], landmark[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = landmark[h] = -infinity();
      sum[h] = mean[h] = 0;
    }
  }

  // dp null: no means.
  template <int kTiles>
  __device__ __forceinline__ void add(const BlockColumns& block, const float (&s)[kTiles][4],
                                      const float (*dp)[4]) {
    float maximum[2] = {-infinity(), -infinity()}, l[2] = {0, 0};
    visit_block<kTiles>(block, [&](int n, int i, int column) {
      if (block.has(column)) maximum[i / 2] = fmaxf(maximum[i / 2], s[n][i]);
      if (column == block.landmark) l[i / 2] += s[n][i];
    });
    float base[2], more[2] = {0, 0}, more_mean[2] = {0, 0};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      maximum[h] = fmaxf(top[h], quad_max(maximum[h]));
      base[h] = maximum[h] == -infinity() ? 0 : maximum[h];
    }
    visit_block<kTiles>(block, [&](int n, int i, int column) {
      if (!block.has(column)) return;
      const float e = exp2_approx(s[n][i] - base[i / 2]);
      more[i / 2] += e;
      if (dp) more_mean[i / 2] = fmaf(e, dp[n][i], more_mean[i / 2]);
    });
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float shrink = exp2_approx(top[h] - base[h]);
      sum[h] = fmaf(sum[h], shrink, quad_sum(more[h]));
      if (dp) mean[h] = fmaf(mean[h], shrink, quad_sum(more_mean[h]));
      top[h] = maximum[h];
      l[h] = quad_sum(l[h]);
      if (block.landmark >= 0) landmark[h] = l[h];
    }
  }

  __device__ float shift(int h) const {
    const float base = top[h] == -infinity() ? 0 : top[h];
    return landmark[h] - base - log2_approx(sum[h] == 0 ? 1 : sum[h]);
  }
  // Mean of dP under the block's own softmax.
  __device__ float mean_of(int h) const { return sum[h] == 0 ? 0 : mean[h] / sum[h]; }
};

}  // namespace tokenmill::cuda::landmark_attention
