// A chunk of the delta rule on a GPU: its place, its operands and products. With G_i the sum of
// log_decay up to token i of the chunk, and S the state before it,
//
//   M_ij = scale q_i . e^(G_i - G_j) k_j  (j <= i)     q_in_i = scale e^(G_i) q_i
//   N_ij =      -k_i . e^(G_i - G_j) k_j  (j < i)      k_in_i =      -e^(G_i) k_i
//                                                      k_end_j = e^(G_n - G_j) k_j
//
//   y0 = v + k_in S     u = X y0  with  X = diag(beta) (1 - N diag(beta))^-1     y = y0 + N u
//   out = q_in S + M u                                S after = e^(G_n) S + k_end^T u
//
// kPerChannel: decays per channel, inside the products of pairs. kCorrects: with beta; without it
// u = v, and N, X and k_in do not exist.
//
// M, N and X do not depend on the state: delta_pairs_kernel computes them for all chunks at once,
// and the sweeps over the chunks of a sequence multiply by them. Tiles are float32 in shared
// memory, and products three tf32 products.
#pragma once
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/sequences.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "linear/decay.cuh"
#include "linear/delta_attention/params.h"

namespace tokenmill::cuda::delta_attention {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
// CTAs per SM for the register budget; without it ptxas aims at four on sm_90, and spills.
constexpr int kBlocksOfMultiprocessor = 2;
constexpr int kTokens = 32;    // of a chunk
constexpr int kBlock = 16;     // tokens whose decays per channel are taken pair by pair
constexpr int kChannels = 64;  // of a tile of q and k
constexpr int kColumns = 32;   // of the state, for each CTA of a sweep
// Floats between rows: 4 more than a multiple of 32 for fragments along a row, 8 more across rows.
constexpr int kKeyStep = kChannels + 4, kPairStep = kTokens + 4, kColumnStep = kColumns + 8;
constexpr int kKeyTile = kTokens * kKeyStep, kPairTile = kTokens * kPairStep;
constexpr int kColumnTile = kTokens * kColumnStep;

// Factors of the rows of a chunk, 0 past its tokens.
struct RowFactors {
  float query[kTokens], key[kTokens];  // 1 / |q|, 1 / |k|, or 1
  float enter[kTokens];                // e^(G_i), 1 if decays are per channel
  float stay[kTokens];                 // e^(G_n - G_i), likewise
  float beta[kTokens];
  float total[kTokens];  // e^(G_n), equal in all
};
constexpr int kFactorFloats = sizeof(RowFactors) / sizeof(float);

enum : int { kOfQueries, kOfKeys, kInverse, kPairMatrices };  // M, N, X

__host__ __device__ constexpr int pair_matrices(bool corrects) {
  return corrects ? kPairMatrices : 1;
}

// Memory between the kernels. A chunk of a sequence and head has a slot; a token of a head a row.
struct Scratch {
  int64_t slots;
  bool vectors;    // rows of q and k allow 16-byte loads
  int matrices;    // of pairs
  float* pairs;    // [slots, H, matrices, kTokens, kTokens]
  float* factors;  // [slots, H, kFactorFloats]
  float* enters;   // [slots, H, kTokens, D] e^(G_i) per channel, row kTokens - 1 that of the chunk
  float* stays;    // [slots, H, kTokens, D] e^(G_n - G_i) per channel
  float *states, *dstates;  // [slots, H, D, Dv] S before a chunk, and its gradient after it
  float *y, *dy;            // [tokens, H, Dv]
  float* dbeta;             // [slices of the columns, tokens, H]
  float *dq, *dk;           // [tokens, H, D] of the normalized rows of each value head

  __device__ float* pairs_of(int64_t slot, int64_t heads, int64_t h, int which) const {
    return pairs + ((slot * heads + h) * matrices + which) * kTokens * kTokens;
  }
  __device__ RowFactors& factors_of(int64_t slot, int64_t heads, int64_t h) const {
    return *reinterpret_cast<RowFactors*>(factors + (slot * heads + h) * kFactorFloats);
  }
};

// A chunk of a value head.
struct Place {
  int64_t b, h, key_head;
  int64_t slot;
  int64_t token;  // the first one, along seq
  int n;          // tokens; 0: none

  __device__ int64_t row(const DeltaAttentionParams& p) const {
    return (p.cu_seqlens ? 0 : b * p.seqlen) + token;
  }
  template <typename T>
  __device__ T* at(const Rows& rows, int64_t head) const {
    return rows_at<T>(rows, b, token, head);
  }
  __device__ float* gate(const TokenGates& g, int64_t t) const {
    return g.data + b * g.batch + (token + t) * g.seq + h * g.head;
  }
};

__device__ __forceinline__ int64_t chunks_of(int64_t tokens) {
  return (tokens + kTokens - 1) / kTokens;
}

// Sequence b: its first row and length, and the slot of its first chunk. Called by all lanes.
__device__ inline PackedRows sequence_of(const DeltaAttentionParams& p, int64_t b, int64_t& slot) {
  if (!p.cu_seqlens) {
    slot = b * chunks_of(p.seqlen);
    return {0, static_cast<int>(p.seqlen)};
  }
  const PackedRows rows = rows_of_sequence(p.cu_seqlens, p.batch, p.seqlen, b);
  slot = first_slot(rows, static_cast<int>(b), kTokens);
  return rows;
}

// The chunk of this CTA where CTAs are chunks times heads. n = 0: calls clear(LooseRows) of rows
// outside of every sequence.
template <typename Clear>
__device__ inline Place place_of_block(const DeltaAttentionParams& p, const Clear& clear) {
  const int64_t number = blockIdx.x / p.heads;
  Place place{};
  place.h = blockIdx.x % p.heads;
  place.key_head = place.h / (p.heads / p.key_heads);
  int64_t tile = 0, length = p.seqlen;
  if (!p.cu_seqlens) {
    const int64_t chunks = chunks_of(p.seqlen);
    place.b = number / chunks;
    tile = number % chunks;
    place.slot = number;
  } else {
    const TilePlace found = find_tile(p.cu_seqlens, p.batch, p.seqlen, kTokens, number);
    if (found.b < 0) {
      clear(LooseRows(found, p.seqlen, kTokens), place.h);
      return place;
    }
    tile = found.tile;
    place.slot = first_slot(found.rows, found.b, kTokens) + tile;
    place.token = found.rows.start;
    length = found.rows.length;
  }
  place.token += tile * kTokens;
  place.n = static_cast<int>(min(int64_t{kTokens}, length - tile * kTokens));
  return place;
}

// d[16][8 kTiles] += A B over `depth`, a multiple of 8. A is [16][depth] at a, or [depth][16]
// transposed; B [depth][8 kTiles] at b, or [8 kTiles][depth] transposed.
template <bool kTransposedA, bool kTransposedB, int kTiles>
__device__ __forceinline__ void multiply(float (&d)[kTiles][4], const float* a, int a_step,
                                         const float* b, int b_step, int depth) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
  const float* const own_a = kTransposedA ? a + c * a_step + g : a + g * a_step + c;
  const float* const own_b = kTransposedB ? b + g * b_step + c : b + c * b_step + g;
  const int a_row = kTransposedA ? 8 : 8 * a_step, a_depth = kTransposedA ? a_step : 1;
  const int b_column = kTransposedB ? 8 * b_step : 8, b_depth = kTransposedB ? 1 : b_step;
#pragma unroll 2
  for (int k = 0; k < depth; k += 8) {
    const float* const x = own_a + k * a_depth;
    const auto fragment = make_fragment<float>(__float_as_uint(x[0]), __float_as_uint(x[a_row]),
                                               __float_as_uint(x[4 * a_depth]),
                                               __float_as_uint(x[4 * a_depth + a_row]));
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float* const y = own_b + k * b_depth + t * b_column;
      mma(d[t], fragment,
          make_fragment<float>(__float_as_uint(y[0]), __float_as_uint(y[4 * b_depth])));
    }
  }
}

// Visits the elements of an accumulator: visit(x, row, column).
template <typename Visit>
__device__ __forceinline__ void each_element(float (&d)[4], const Visit& visit) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int e = 0; e < 4; ++e) visit(d[e], lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2);
}

// d += A B for a lower triangular pair matrix A (its transpose with kTransposed), rows `row` on of
// it; B [kTokens][8] at b. The weights of 0 hide what is not finite in B.
template <bool kTransposed>
__device__ __forceinline__ void multiply_pairs(float (&d)[1][4], const float* a, int row,
                                               const float* b, bool finite) {
  if (finite) {
    multiply<kTransposed, false>(d, kTransposed ? a + row : a + row * kPairStep, kPairStep, b,
                                 kColumnStep, kTokens);
    return;
  }
  each_element(d[0], [&](float& x, int r, int c) {
    const int i = row + r;
    for (int k = kTransposed ? i : 0; k < (kTransposed ? kTokens : i + 1); ++k)
      x = fmaf(kTransposed ? a[k * kPairStep + i] : a[i * kPairStep + k], b[k * kColumnStep + c],
               x);
  });
}

// Tile of rows of q or k from channel `first` on: x factor[t] by_channel[t][d]. 0 past the tokens
// and the channels.
template <typename T>
__device__ __forceinline__ void load_keys(float* to, const T* from, int64_t seq, int n, int64_t dim,
                                          int64_t first, const float* factor,
                                          const float* by_channel, bool vectors) {
  constexpr int kVector = 16 / sizeof(T);
  const auto put = [&]<int kCount>(int i, const float (&x)[kCount]) {
    const int t = i / (kChannels / kCount), d = i % (kChannels / kCount) * kCount;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      float y = factor[t] * x[e];
      if (by_channel) y *= by_channel[t * dim + first + d + e];
      to[t * kKeyStep + d + e] = y;
    }
  };
  if (vectors) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kTokens * kChannels / kVector; i += kThreads) {
      const int t = i / (kChannels / kVector), d = i % (kChannels / kVector) * kVector;
      float x[kVector];
      if (t < n && first + d < dim) {
        load_floats(x, from + t * seq + first + d);
        put(i, x);
      } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) to[t * kKeyStep + d + e] = 0;
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kTokens * kChannels; i += kThreads) {
    const int t = i / kChannels, d = i % kChannels;
    if (t < n && first + d < dim) {
      const float x[1] = {static_cast<float>(from[t * seq + first + d])};
      put(i, x);
    } else {
      to[t * kKeyStep + d] = 0;
    }
  }
}

// Tile [kTokens][width] of rows from column `first` on, times factor[t] unless null; 0 past the
// tokens and the columns. null `from`: zeros.
template <typename T>
__device__ __forceinline__ void load_columns(float* to, int step, int width, const T* from,
                                             int64_t seq, int n, int64_t first, int64_t columns,
                                             const float* factor = nullptr) {
  for (int i = threadIdx.x; i < kTokens * width; i += kThreads) {
    const int t = i / width, c = i % width;
    float x = 0;
    if (from && t < n && first + c < columns) {
      x = static_cast<float>(from[t * seq + first + c]);
      if (factor) x *= factor[t];
    }
    to[t * step + c] = x;
  }
}

template <typename T>
__device__ __forceinline__ void store_columns(T* to, int64_t seq, const float* from, int step,
                                              int width, int n, int64_t first, int64_t columns) {
  for (int i = threadIdx.x; i < n * width; i += kThreads) {
    const int t = i / width, c = i % width;
    if (first + c < columns) to[t * seq + first + c] = static_cast<T>(from[t * step + c]);
  }
}

__device__ __forceinline__ void load_pairs(float* to, const float* from) {
  for (int i = threadIdx.x; i < kTokens * kTokens / 4; i += kThreads) {
    const int row = i / (kTokens / 4), column = i % (kTokens / 4) * 4;
    *reinterpret_cast<float4*>(to + row * kPairStep + column) =
        *reinterpret_cast<const float4*>(from + 4 * i);
  }
}

__device__ __forceinline__ void load_factors(RowFactors& to, const RowFactors& from) {
  if (threadIdx.x < kFactorFloats)
    reinterpret_cast<float*>(&to)[threadIdx.x] = reinterpret_cast<const float*>(&from)[threadIdx.x];
}

}  // namespace tokenmill::cuda::delta_attention
