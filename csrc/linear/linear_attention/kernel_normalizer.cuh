// The normaliser: what a column of ones among the values would give, without tensor cores.
#pragma once
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda {

template <typename T>
__device__ __forceinline__ void load_chunk(float (&to)[kChunkBytes / sizeof(T)], uint32_t address) {
  uint32_t words[4];
  load_shared(words, address);
#pragma unroll
  for (int i = 0; i < static_cast<int>(kChunkBytes / sizeof(T)); ++i)
    to[i] = static_cast<float>(reinterpret_cast<const T*>(words)[i]);
}

// Threads share the chunks of the rows of a token: token threadIdx.x % kTokens.
template <typename T, typename Shape>
struct NormalizerRow {
  static constexpr int kCount = kChunkBytes / sizeof(T);
  int token = threadIdx.x % Shape::kTokens, part = threadIdx.x / Shape::kTokens;
  int parts = blockDim.x / Shape::kTokens;

  // Of the state, in the features of a step.
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

  // Of the chunk.
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

// state = total state + sum of weighted keys, n of them, for the features of a step.
template <typename T, typename Shape>
__device__ void add_to_normalizer(float* state, float total, const float* weights, uint32_t keys,
                                  int n) {
  constexpr int kCount = 4 / sizeof(T);  // elements of a word
  const int warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int words = Shape::kFeatures / kCount / warps;  // of a warp, a power of two
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

}  // namespace tokenmill::cuda
