// Outputs: products of weights with a step of values in shared memory, by one warp.
#pragma once
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/attention/hidden_values.cuh"
#include "cuda/math.cuh"
#include "cuda/unroll.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

// Weights as the left operand of multiply_values.
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

// out[kFirst + m] += weights p[m] x values. before(pair) comes before the values of 16 columns.
// With kClean values are made finite.
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

// The same for one row tile where a mask cuts the step and not all values are finite: sees(0, key)
// and sees(1, key) say which of the kKeys keys rows g and g + 8 see. any_sign: see add_infinite.
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
