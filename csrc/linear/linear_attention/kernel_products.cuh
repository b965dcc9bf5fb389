// The four products of a chunk, by one warp. Weights W = Q K^T are in shared memory, [queries,
// keys]; everything with V columns is transposed: 16 columns of V are the rows of a fragment, so
// that the state, which stays in accumulators, is itself an MMA operand.
#pragma once
#include "attention/masked_values.cuh"
#include "cuda/arch/ldmatrix.cuh"
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda::linear_attention {

// 16-bit tiles: this lane's ldmatrix address for rows row ... row + 15. The pair of 16-byte chunks
// 2 kPair, 2 kPair + 1 is at square<Tile, kPair>(base); rows 16 n on are kRowBytes 16 n further.
template <typename Tile>
__device__ __forceinline__ uint32_t square_base(uint32_t tile, int row) {
  const int lane = threadIdx.x % kWarpSize;
  return tile + Tile::offset(row + lane % 16, lane / 16);
}
template <typename Tile, int kPair, int kRow = 0>
__device__ __forceinline__ void load_square(uint32_t (&w)[4], uint32_t base) {
  constexpr int kPattern = Tile::kSwizzledChunks / 2;
  ldmatrix<kPair / kPattern * kPattern * 32 + kRow * Tile::kRowBytes>(
      w, base ^ (kPair % kPattern * 32));
}
template <typename Tile, int kPair, int kRow = 0>
__device__ __forceinline__ void load_square_transposed(uint32_t (&w)[4], uint32_t base) {
  constexpr int kPattern = Tile::kSwizzledChunks / 2;
  ldmatrix_trans<kPair / kPattern * kPattern * 32 + kRow * Tile::kRowBytes>(
      w, base ^ (kPair % kPattern * 32));
}

__device__ __forceinline__ void load_pair(uint32_t& x, uint32_t& y, uint32_t address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(x), "=r"(y) : "r"(address));
}
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(x) : "r"(address));
  return x;
}

template <typename T>
__device__ __forceinline__ float load_element(uint32_t address) {
  if constexpr (sizeof(T) == 4) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(x) : "r"(address));
    return x;
  } else {
    uint16_t word;
    asm volatile("ld.shared.u16 %0, [%1];\n" : "=h"(word) : "r"(address));
    return static_cast<float>(reinterpret_cast<const T&>(word));
  }
}

// Element (row, column) of a tile.
template <typename T, typename Tile>
__device__ __forceinline__ float element(uint32_t tile, int row, int column) {
  const int byte = column * static_cast<int>(sizeof(T));
  return load_element<T>(tile + Tile::offset(row, byte / kChunkBytes) + byte % kChunkBytes);
}

// Address of element (row, column) of a float tile.
template <typename Tile>
__device__ __forceinline__ uint32_t float_at(uint32_t tile, int row, int column) {
  return tile + Tile::offset(row, column / 4) + column % 4 * 4;
}

// d[16, 16] += A B^T: rows query ... query + 15 times rows key ... key + 15, over all columns.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply_rows(float (&d)[2][4], uint32_t queries, int query,
                                              uint32_t keys, int key) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t a_base = square_base<Tile>(queries, query),
                   b_base = square_base<Tile>(keys, key);
    unroll<Tile::kChunks / 2>([&](auto pair) {
      uint32_t a[4], b[4];
      load_square<Tile, pair>(a, a_base);
      load_square<Tile, pair>(b, b_base);
      const auto fragment = make_fragment<T>(a[0], a[1], a[2], a[3]);
      mma(d[0], fragment, make_fragment<T>(b[0], b[2]));
      mma(d[1], fragment, make_fragment<T>(b[1], b[3]));
    });
  } else {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
#pragma unroll 2
    for (int slice = 0; slice < Tile::kChunks / 4; ++slice) {
      uint32_t low[4], high[4], b[2][4];
      load_shared(low, queries + Tile::offset(query + g, 4 * slice + c));
      load_shared(high, queries + Tile::offset(query + 8 + g, 4 * slice + c));
#pragma unroll
      for (int n = 0; n < 2; ++n)
        load_shared(b[n], keys + Tile::offset(key + 8 * n + g, 4 * slice + c));
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const auto a = make_fragment<T>(low[2 * u], high[2 * u], low[2 * u + 1], high[2 * u + 1]);
#pragma unroll
        for (int n = 0; n < 2; ++n) mma(d[n], a, make_fragment<T>(b[n][2 * u], b[n][2 * u + 1]));
      }
    }
  }
}

// Causal mask for an accumulator of multiply_rows, row g + `row`, column 2 c + `column`, if both
// rows and columns begin at the same token: true if the key is less than `shift` tokens before the
// query.
__device__ __forceinline__ bool is_hidden(int row, int column, int shift) {
  int lane = threadIdx.x % kWarpSize;
  opt_barrier(lane);
  return lane % 4 * 2 + column + shift > lane / 4 + row;
}

// Power-of-two scales of state rows g and g + 8, and their inverses, that bring the largest element
// near 2^14, within the range of float16.
struct RowScale {
  float factor[2] = {1, 1}, inverse[2] = {1, 1};

  __device__ RowScale() {}
  template <int kTiles>
  __device__ explicit RowScale(const float (&s)[kTiles][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) set(h, exponent_of(s, h));
  }
  // Scales that also keep `sums` finite. A state that this limits is 2^-86 of the sums.
  template <int kTiles, int kSumTiles>
  __device__ RowScale(const float (&s)[kTiles][4], const float (&sums)[kSumTiles][4]) {
    float top[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < kSumTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        top[i / 2] = fmaxf(top[i / 2], fabsf(sums[n][i]) < infinity() ? fabsf(sums[n][i]) : 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) set(h, max(exponent_of(s, h), biased_exponent(top[h]) - 86));
  }

 private:
  __device__ static int biased_exponent(float top) { return __float_as_int(quad_max(top)) >> 23; }
  template <int kTiles>
  __device__ static int exponent_of(const float (&s)[kTiles][4], int h) {
    float top = 0;
#pragma unroll
    for (const auto& x : s) top = fmaxf(top, fmaxf(fabsf(x[2 * h]), fabsf(x[2 * h + 1])));
    return max(biased_exponent(top), 15);
  }
  __device__ void set(int h, int exponent) {
    factor[h] = __int_as_float(268 - exponent << 23);
    inverse[h] = __int_as_float(exponent - 14 << 23);
  }
};

// Features 16 k ... 16 k + 15 of the state as an A fragment of 16 bits: its high part, and the
// remainder.
template <typename T, int kTiles>
struct StateFragment {
  uint32_t high[4], low[4];

  __device__ __forceinline__ StateFragment(const float (&s)[kTiles][4], int k,
                                           const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = s[2 * k + i / 2][i % 2 * 2] * factor[i % 2];
      const float y = s[2 * k + i / 2][i % 2 * 2 + 1] * factor[i % 2];
      high[i] = pack<T>(x, y);
      const float2 rounded = unpack<T>(high[i]);
      low[i] = pack<T>(x - rounded.x, y - rounded.y);
    }
  }
};

template <int kTiles>
__device__ __forceinline__ void scale_rows(float (&x)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (auto& tile : x)
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[i] *= factor[i / 2];
}

// acc[tokens, 16 columns]^T += state^T Q^T; acc is 0 unless the features have several steps. 16-bit
// products take the state as high + low, in float16 only if `split`.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply_state(float (&acc)[Shape::kTokens / 8][4],
                                               const float (&s)[Shape::kFeatureTiles][4],
                                               uint32_t queries, bool split) {
  using Tile = typename Shape::FeatureTile;
  constexpr int kTokenTiles = Shape::kTokens / 8;
  if constexpr (Shape::kFloat) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int n = 0; n < Shape::kFeatureTiles; ++n) {
      const auto a = make_fragment<T>(__float_as_uint(s[n][0]), __float_as_uint(s[n][2]),
                                      __float_as_uint(s[n][1]), __float_as_uint(s[n][3]));
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        uint32_t x, y;
        load_pair(x, y, float_at<Tile>(queries, 8 * t + g, 8 * n + 2 * c));
        mma(acc[t], a, make_fragment<T>(x, y));
      }
    }
  } else {
    constexpr bool kHalf = std::is_same_v<T, __half>;
    const uint32_t base = square_base<Tile>(queries, 0);
    RowScale scale;
    if constexpr (kHalf && Shape::kSteps) {
      scale = RowScale(s, acc);
      scale_rows(acc, scale.factor);
    } else if constexpr (kHalf) {
      scale = RowScale(s);
    }
    unroll<Shape::kFeatureTiles / 2>([&](auto k) {
      const StateFragment<T, Shape::kFeatureTiles> a(s, k, scale.factor);
      const auto high = make_fragment<T>(a.high[0], a.high[1], a.high[2], a.high[3]);
      const auto low = make_fragment<T>(a.low[0], a.low[1], a.low[2], a.low[3]);
      unroll<kTokenTiles / 2>([&](auto pair) {
        uint32_t w[4];
        load_square<Tile, k, 16 * pair>(w, base);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const auto b = make_fragment<T>(w[t], w[t + 2]);
          if (!kHalf || split) mma(acc[2 * pair + t], low, b);
          mma(acc[2 * pair + t], high, b);
        }
      });
    });
    if constexpr (kHalf) scale_rows(acc, scale.inverse);
  }
}

// The warp's 16 columns of a chunk of V, transposed to A fragments, not yet weighted.
template <typename T, typename Shape>
struct ValueFragments {
  static constexpr int kBlocks = Shape::kTokens / Shape::kDepth;
  uint32_t words[kBlocks][4];

  // `column`: within the subtile at `values`.
  __device__ __forceinline__ void load(uint32_t values, int column) {
    using Tile = typename Shape::ValueTile;
    if constexpr (Shape::kFloat) {
      const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
#pragma unroll
      for (int k = 0; k < kBlocks; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          words[k][i] =
              load_word(float_at<Tile>(values, 8 * k + 2 * c + i / 2, column + g + i % 2 * 8));
    } else {
      const uint32_t at = own_chunk(values, column);
      unroll<kBlocks>([&](auto k) { ldmatrix_trans<16 * k * Tile::kRowBytes>(words[k], at); });
    }
  }

  // Chunk (lane / 8) % 2 of row lane % 8 + 8 (lane / 16) of the 16 columns.
  __device__ static uint32_t own_chunk(uint32_t values, int column) {
    const int lane = threadIdx.x % kWarpSize;
    return values + Shape::ValueTile::offset(lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2);
  }

  __device__ __forceinline__ Fragment<T, 4> operator[](int k) const {
    return make_fragment<T>(words[k][0], words[k][1], words[k][2], words[k][3]);
  }

  __device__ __forceinline__ void make_all_finite() {
#pragma unroll
    for (int k = 0; k < kBlocks; ++k)
#pragma unroll
      for (uint32_t& word : words[k]) word = make_finite<T>(word);
  }

  // Fragment k scaled by the weights of its tokens; in 16 bits also what the rounding leaves.
  __device__ __forceinline__ Fragment<T, 4> weighted(int k, const float* weights,
                                                     bool rest = false) const {
    const int c = threadIdx.x % 4;
    uint32_t w[4];
    if constexpr (Shape::kFloat) {
      const float2 of = *reinterpret_cast<const float2*>(weights + 8 * k + 2 * c);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        w[i] = __float_as_uint(__uint_as_float(words[k][i]) * (i < 2 ? of.x : of.y));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 of = *reinterpret_cast<const float2*>(weights + 16 * k + 2 * c + i / 2 * 8);
        float2 x = unpack<T>(words[k][i]);
        x.x *= of.x, x.y *= of.y;
        w[i] = pack<T>(x.x, x.y);
        if (rest) {
          const float2 rounded = unpack<T>(w[i]);
          w[i] = pack<T>(x.x - rounded.x, x.y - rounded.y);
        }
      }
    }
    return make_fragment<T>(w[0], w[1], w[2], w[3]);
  }
};

// acc += V^T W^T. Keys after the last query of a tile are skipped.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply_weights(float (&acc)[Shape::kTokens / 8][4],
                                                 const ValueFragments<T, Shape>& values,
                                                 uint32_t weights) {
  using Tile = typename Shape::WeightTile;
  if constexpr (Shape::kFloat) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int k = 0; k < Shape::kTokens / 8; ++k) {
      const auto a = values[k];
#pragma unroll
      for (int t = k; t < Shape::kTokens / 8; ++t) {
        uint32_t x, y;
        load_pair(x, y, float_at<Tile>(weights, 8 * t + g, 8 * k + 2 * c));
        mma(acc[t], a, make_fragment<T>(x, y));
      }
    }
  } else {
    const uint32_t base = square_base<Tile>(weights, 0);
    constexpr int kBlocks = Shape::kTokens / 16;
    unroll<kBlocks>([&](auto k) {
      const auto a = values[k];
      unroll<kBlocks - k>([&](auto pair) {
        uint32_t w[4];
        load_square<Tile, k, 16 * (k + pair)>(w, base);
        mma(acc[2 * (k + pair)], a, make_fragment<T>(w[0], w[2]));
        mma(acc[2 * (k + pair) + 1], a, make_fragment<T>(w[1], w[3]));
      });
    });
  }
}

// acc += W V over the non-finite elements of V, at `column` of the subtile at `values`, for queries
// at least `shift` tokens after them.
template <typename T, typename Shape>
__device__ __forceinline__ void add_infinite(float (&acc)[Shape::kTokens / 8][4], uint32_t values,
                                             int column, uint32_t weights, int shift) {
  constexpr int kDepth = Shape::kDepth, kTiles = kDepth / 8;
  int lane = threadIdx.x % kWarpSize;
  opt_barrier(lane);
  const int g = lane / 4, c = lane % 4;
  unroll<Shape::kTokens / kDepth>([&](auto k) {
#pragma unroll 1
    for (int key = k * kDepth; key < (k + 1) * kDepth; ++key) {
      float x[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        x[h] = element<T, typename Shape::ValueTile>(values, key, column + g + 8 * h);
#pragma unroll
      for (int t = k * kTiles; t < Shape::kTokens / 8; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int query = 8 * t + 2 * c + e;
          const float weight = element<T, typename Shape::WeightTile>(weights, query, key);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (key + shift <= query && !is_finite<T>(x[h]))
              acc[t][2 * h + e] = fmaf(x[h], weight, acc[t][2 * h + e]);
        }
    }
  });
}

// acc += V^T W^T for any V, including non-finite values; `state` is the state after the chunk,
// `shift` as above.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply_seen_weights(float (&acc)[Shape::kTokens / 8][4],
                                                      const float (&state)[Shape::kFeatureTiles][4],
                                                      ValueFragments<T, Shape>& fragments,
                                                      uint32_t values, int column, uint32_t weights,
                                                      int shift) {
  // A non-finite value makes its sum in the state non-finite, whatever its key.
  if (__any_sync(kFullWarp, !is_finite<float>(state[0][0]) || !is_finite<float>(state[0][2]))) {
    add_infinite<T, Shape>(acc, values, column, weights, shift);
    fragments.make_all_finite();
  }
  multiply_weights<T, Shape>(acc, fragments, weights);
}

// state^T += (weights V)^T K. With `split`, which has weights, 16-bit products take weights V as
// high + low.
template <typename T, typename Shape>
__device__ __forceinline__ void add_to_state(float (&s)[Shape::kFeatureTiles][4],
                                             const ValueFragments<T, Shape>& values,
                                             const float* weights, uint32_t keys, bool split) {
  using Tile = typename Shape::FeatureTile;
  if constexpr (Shape::kFloat) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int k = 0; k < Shape::kTokens / 8; ++k) {
      const auto a = weights ? values.weighted(k, weights) : values[k];
#pragma unroll
      for (int n = 0; n < Shape::kFeatureTiles; ++n)
        mma(s[n], a,
            make_fragment<T>(load_word(float_at<Tile>(keys, 8 * k + 2 * c, 8 * n + g)),
                             load_word(float_at<Tile>(keys, 8 * k + 2 * c + 1, 8 * n + g))));
    }
  } else {
    const uint32_t base = square_base<Tile>(keys, 0);
    const auto add = [&](auto k, const auto& a) {
      unroll<Shape::kFeatureTiles / 2>([&](auto pair) {
        uint32_t w[4];
        load_square_transposed<Tile, pair, 16 * k>(w, base);
        mma(s[2 * pair], a, make_fragment<T>(w[0], w[1]));
        mma(s[2 * pair + 1], a, make_fragment<T>(w[2], w[3]));
      });
    };
    unroll<Shape::kTokens / 16>([&](auto k) {
      if (split) add(k, values.weighted(k, weights, true));
      add(k, weights ? values.weighted(k, weights) : values[k]);
    });
  }
}

}  // namespace tokenmill::cuda::linear_attention
