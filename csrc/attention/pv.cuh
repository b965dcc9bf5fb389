// O += P V for one warp and a step of values in shared memory.
#pragma once
#include "attention/masked_values.cuh"
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/math.cuh"
#include "cuda/unroll.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

// P as A fragments of the P V product.
template <typename T, int kKeyTiles, int kBlocks>
__device__ __forceinline__ void set_fragments(Fragment<T, 4> (&p)[kBlocks],
                                              const float (&e)[kKeyTiles][4]) {
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    if constexpr (sizeof(T) == 4) {
      p[k] = make_fragment<T>(__float_as_uint(e[k][0]), __float_as_uint(e[k][2]),
                              __float_as_uint(e[k][1]), __float_as_uint(e[k][3]));
    } else {
      const float (&low)[4] = e[2 * k], (&high)[4] = e[2 * k + 1];
      p[k] = make_fragment<T>(pack<T>(low[0], low[1]), pack<T>(low[2], low[3]),
                              pack<T>(high[0], high[1]), pack<T>(high[2], high[3]));
    }
  }
}

// to[i] = from[j]
template <int kFrom>
__device__ __forceinline__ void copy_word(Fragment<float, 4>& to, int i,
                                          const Fragment<float, kFrom>& from, int j) {
  to.high[i] = from.high[j], to.low[i] = from.low[j];
}
template <typename T, int kFrom>
__device__ __forceinline__ void copy_word(Fragment<T, 4>& to, int i, const Fragment<T, kFrom>& from,
                                          int j) {
  to.words[i] = from.words[j];
}

// Scales the weights in P fragments by factor(h, n): row g (h = 0) or g + 8 (h = 1), n-th key from
// the lane's first. Word by word, always through the first word: the kernels have no registers to
// hold more.
template <typename T, int kBlocks, typename Factor>
__device__ __forceinline__ void scale_weights(Fragment<T, 4> (&p)[kBlocks], const Factor& factor) {
  constexpr int kWords = 4 * kBlocks;
#pragma unroll 1
  for (int at = 0; at < kWords; ++at) {
    Fragment<T, 1> scaled;
    if constexpr (sizeof(T) == 4) {
      const float w = __uint_as_float(p[0].high[0]) + __uint_as_float(p[0].low[0]);
      scaled = make_fragment<T>(__float_as_uint(w * factor(at % 2, at / 4 * 8 + at / 2 % 2)));
    } else {
      const float2 w = unpack<T>(p[0].words[0]);
      const int key = at / 2 * 8;
      scaled = make_fragment<T>(pack<T>(w.x * factor(at % 2, key), w.y * factor(at % 2, key + 1)));
    }
#pragma unroll
    for (int i = 0; i + 1 < kWords; ++i) copy_word(p[i / 4], i % 4, p[(i + 1) / 4], (i + 1) % 4);
    copy_word(p[kBlocks - 1], 3, scaled, 0);
  }
}

// out[kFirst + m] += P[m] V. before(pair) runs before the values of each 16 columns are loaded.
// kClean: values that are not finite are replaced by finite ones.
template <typename T, int kFirst, int kOffset, bool kClean = false, int kRowTiles, int kTiles,
          int kCount, int kBlocks, typename Addresses, typename Before>
__device__ __forceinline__ void multiply_values(float (&out)[kRowTiles][kTiles][4],
                                                const Fragment<T, 4> (&p)[kCount][kBlocks],
                                                const Addresses& at, const Before& before) {
  constexpr int kDepth = kMmaDepth<T>;
  const auto value = [](uint32_t word) { return kClean ? make_finite<T>(word) : word; };
  unroll<kBlocks>([&](auto k) {
    if constexpr (sizeof(T) == 4) {
      unroll<kTiles / 4>([&](auto group) {
        uint32_t even[4], odd[4];
        at.template load_float_values<kOffset + kDepth * k, 0, group>(even);
        at.template load_float_values<kOffset + kDepth * k, 1, group>(odd);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const auto b = make_fragment<T>(value(even[t]), value(odd[t]));
#pragma unroll
          for (int m = 0; m < kCount; ++m) mma(out[kFirst + m][4 * group + t], p[m][k], b);
        }
      });
    } else {
      unroll<kTiles / 2>([&](auto pair) {
        before(pair);
        uint32_t w[4];
        at.template load_values<kOffset + kDepth * k, pair>(w);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const auto b = make_fragment<T>(value(w[2 * t]), value(w[2 * t + 1]));
#pragma unroll
          for (int m = 0; m < kCount; ++m) mma(out[kFirst + m][2 * pair + t], p[m][k], b);
        }
      });
    }
  });
}

// out += P V for one row tile where a mask cuts the step and some values are not finite. sees(0,
// key) and sees(1, key): visibility of the kKeys keys to rows g and g + 8. any_sign: see
// add_infinite.
template <typename T, int kFirst, int kKeys, int kRowTiles, int kTiles, int kBlocks,
          typename Addresses, typename Before, typename Sees>
__device__ __forceinline__ void multiply_seen_values(float (&out)[kRowTiles][kTiles][4],
                                                     const Fragment<T, 4> (&p)[1][kBlocks],
                                                     const Addresses& at, const Before& before,
                                                     const Sees& sees, bool any_sign = false) {
  multiply_values<T, kFirst, 0, true>(out, p, at, before);
  add_infinite<T, typename Addresses::ValueTile, kKeys>(out[kFirst], at.values(), sees, any_sign);
}

}  // namespace tokenmill::cuda
