// Products on CUDA cores: the normalizer, equivalent to a column of ones in V, and the extra
// feature, equivalent to one more column in Q and K.
#pragma once
#include "linear/linear_attention/kernel_features.cuh"

namespace tokenmill::cuda::linear_attention {

template <typename T>
__device__ __forceinline__ void load_chunk(float (&to)[kChunkBytes / sizeof(T)], uint32_t address) {
  uint32_t words[4];
  load_shared(words, address);
#pragma unroll
  for (int i = 0; i < static_cast<int>(kChunkBytes / sizeof(T)); ++i)
    to[i] = static_cast<float>(reinterpret_cast<const T*>(words)[i]);
}

// Threads with the same token, threadIdx.x % kTokens, share the 16-byte chunks of its rows.
template <typename T, typename Shape>
struct NormalizerRow {
  static constexpr int kCount = kChunkBytes / sizeof(T);
  int token = threadIdx.x % Shape::kTokens, part = threadIdx.x / Shape::kTokens;
  int parts = blockDim.x / Shape::kTokens;

  // Contribution of the state, over the features of a step.
  __device__ __forceinline__ float of_state(uint32_t queries, const float* state) const {
    float sum = 0;
#pragma unroll 1
    for (int i = part; i < Shape::kFeatureChunks; i += parts) {
      float x[kCount];
      load_chunk<T>(x, queries + Shape::FeatureTile::offset(token, i));
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum = fmaf(x[e], state[kCount * i + e], sum);
    }
    return sum;
  }

  // Contribution of the chunk.
  __device__ __forceinline__ float of_weights(uint32_t weights) const {
    float sum = 0;
#pragma unroll 1
    for (int i = part; i * kCount < (token / 16 + 1) * 16; i += parts) {
      float x[kCount];
      load_chunk<T>(x, weights + Shape::WeightTile::offset(token, i));
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum += x[e];
    }
    return sum;
  }
};

// state = total state + sum of n weighted keys, for the features of a step.
template <typename T, typename Shape>
__device__ void add_to_normalizer(float* state, float total, const float* weights, uint32_t keys,
                                  int n) {
  constexpr int kCount = 4 / sizeof(T);  // elements per word
  const int warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int words = Shape::kFeatures / kCount / warps;  // per warp, a power of two
  const int side = min(words, kWarpSize);
#pragma unroll 1
  for (int first = 0; first < words; first += side) {
    const int word = warp * words + first + lane % side;
    float sum[kCount] = {};
#pragma unroll 4
    for (int token = lane / side; token < n; token += kWarpSize / side) {
      uint32_t x;
      asm volatile("ld.shared.b32 %0, [%1];\n"
                   : "=r"(x)
                   : "r"(keys + Shape::FeatureTile::offset(token, word / 4) + word % 4 * 4));
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        sum[e] =
            fmaf(weights[token], static_cast<float>(reinterpret_cast<const T*>(&x)[e]), sum[e]);
    }
#pragma unroll 1
    for (int offset = side; offset < kWarpSize; offset *= 2)
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum[e] += __shfl_xor_sync(kFullWarp, sum[e], offset);
    if (lane < side)
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        float& of = state[word * kCount + e];
        of = fmaf(total, of, sum[e]);
      }
  }
}

// Extra feature of n tokens, for the warp's 16 columns from `column` of a V subtile on: adds its
// contribution to acc, and returns its row of the state, one column per lane.
template <typename T, typename Shape>
__device__ __forceinline__ float add_extra(float (&acc)[Shape::kTokens / 8][4], float state,
                                           const SharedVectors<Shape::kTokens>& vectors,
                                           bool of_queries, uint32_t values, int column, int n) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
  const float of_column[2] = {__shfl_sync(kFullWarp, state, g),
                              __shfl_sync(kFullWarp, state, g + 8)};
#pragma unroll
  for (int t = 0; t < Shape::kTokens / 8; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      acc[t][i] =
          fmaf(of_queries ? vectors.extra[8 * t + 2 * c + i % 2] : 1, of_column[i / 2], acc[t][i]);
  const int byte = (column + lane % kColumnsPerWarp) * static_cast<int>(sizeof(T));
  float sum = 0;
#pragma unroll 1
  for (int token = lane / kColumnsPerWarp; token < n; token += 2) {
    const uint32_t at =
        values + Shape::ValueTile::offset(token, byte / kChunkBytes) + byte % kChunkBytes;
    sum = fmaf(vectors.end[token] * (of_queries ? 1 : vectors.extra[token]), load_element<T>(at),
               sum);
  }
  sum += __shfl_xor_sync(kFullWarp, sum, kColumnsPerWarp);
  return fmaf(vectors.total[0], state, sum);
}

}  // namespace tokenmill::cuda::linear_attention
