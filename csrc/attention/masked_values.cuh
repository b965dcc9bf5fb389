// NaN and infinity in values that a mask hides: their weights are 0, but 0 times NaN or infinity is
// NaN.
//
// Where a mask cuts a step of keys that has such values, P V uses finite numbers in their place,
// and the ones that a row does see are added afterwards, key by key. This is rare: it takes time,
// but no registers that are live through the product.
#pragma once
#include <type_traits>

#include "cuda/arch/opaque.cuh"
#include "cuda/arch/shared_memory.cuh"
#include "cuda/math.cuh"
#include "cuda/tile.cuh"
#include "cuda/unroll.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

// Finite as an MMA operand: floats near the largest one become infinite when they are rounded to
// tf32.
template <typename T>
__device__ __forceinline__ bool is_finite(float x) {
  return fabsf(x) < (sizeof(T) == 4 ? __int_as_float(0x7f7ff000) : infinity());
}

// Sets `found` to a nonzero value if an element of the word is not finite, and keeps it nonzero.
template <typename T>
__device__ __forceinline__ void note_infinite(uint32_t& found, uint32_t word) {
  if constexpr (sizeof(T) == 4)
    found |= !is_finite<T>(__uint_as_float(word));
  else if constexpr (std::is_same_v<T, __half>)
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(found) : "r"(word), "r"(0));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(found) : "r"(word), "r"(0));
}

// Replaces elements that are not finite by finite ones.
template <typename T>
__device__ __forceinline__ uint32_t make_finite(uint32_t word) {
  if constexpr (sizeof(T) == 4) return is_finite<T>(__uint_as_float(word)) ? word : 0;
  constexpr uint32_t kMax = std::is_same_v<T, __half> ? 0x7bff7bff : 0x7f7f7f7f;
  uint32_t y;
  if constexpr (std::is_same_v<T, __half>)
    asm("{ .reg .b32 t; max.f16x2 t, %1, %2; min.f16x2 %0, t, %3; }"
        : "=r"(y)
        : "r"(word), "r"(kMax | 0x80008000), "r"(kMax));
  else
    asm("{ .reg .b32 t; max.bf16x2 t, %1, %2; min.bf16x2 %0, t, %3; }"
        : "=r"(y)
        : "r"(word), "r"(kMax | 0x80008000), "r"(kMax));
  return y;
}

// True if all kKeys values at `at` are finite. Called by all lanes of a warp.
template <typename T, int kKeys, int kTiles, typename Addresses>
__device__ __forceinline__ bool all_finite(const Addresses& at) {
  uint32_t found = 0;
  if constexpr (sizeof(T) == 4) {
    unroll<kKeys / 8>([&](auto k) {
      unroll<kTiles / 4>([&](auto group) {
        unroll<2>([&](auto odd) {
          uint32_t w[4];
          at.template load_float_values<8 * k, odd, group>(w);
#pragma unroll
          for (int i = 0; i < 4; ++i) note_infinite<T>(found, w[i]);
        });
      });
    });
  } else {
    unroll<kKeys / 16>([&](auto k) {
      unroll<kTiles / 2>([&](auto pair) {
        uint32_t w[4];
        at.template load_values<16 * k, pair>(w);
#pragma unroll
        for (int i = 0; i < 4; ++i) note_infinite<T>(found, w[i]);
      });
    });
  }
  return !__any_sync(kFullWarp, found);
}

// Adds to 16 rows of O the values, among the kKeys at `values`, that are not finite and visible by
// sees(0, key) to row g or by sees(1, key) to row g + 8. Weights are taken to be positive: one that
// underflowed to 0 would make NaN of an infinity. any_sign: the contribution is NaN.
template <typename T, typename Tile, int kKeys, int kTiles, typename Sees>
__device__ __forceinline__ void add_infinite(float (&out)[kTiles][4], uint32_t values,
                                             const Sees& sees, bool any_sign) {
  constexpr int kPatterns = Tile::kSwizzledChunks;
  uint32_t seen = 0;
#pragma unroll 1
  for (int key = 0; key < kKeys; ++key) seen |= (sees(0, key) | sees(1, key) << 16) << key;
  int lane = threadIdx.x % kWarpSize;
  opt_barrier(lane);
  const int c = lane % 4;
  // factor 4: values near the largest float overflow too
  const float weight = any_sign ? quiet_nan() : 4;
#pragma unroll 1
  for (int key = 0; key < kKeys; ++key, seen >>= 1) {
    const bool first = seen & 1, second = seen & 0x10000;
    const auto add = [&](float (&to)[4], int column, float x) {
      if (!is_finite<T>(x) && first) to[column] = fmaf(x, weight, to[column]);
      if (!is_finite<T>(x) && second) to[2 + column] = fmaf(x, weight, to[2 + column]);
    };
    if constexpr (sizeof(T) == 4) {
      static_assert(kPatterns == 8);
      const uint32_t at = values + Tile::offset(key, 2 * c);
      unroll<kTiles / 2>([&](auto n) {
        uint32_t w[4];
        load_shared<n / 2 * 8 * kChunkBytes>(w, at ^ n % 2 * kChunkBytes);
        unroll<4>([&](auto t) { add(out[n / 2 * 4 + t], n % 2, __uint_as_float(w[t])); });
      });
    } else {
      const uint32_t at = values + Tile::offset(key, 0) + 4 * c;
      unroll<kTiles>([&](auto n) {
        const uint32_t word =
            load_word<n / kPatterns * kPatterns * kChunkBytes>(at ^ n % kPatterns * kChunkBytes);
        const float2 x = unpack<T>(word);
        add(out[n], 0, x.x);
        add(out[n], 1, x.y);
      });
    }
  }
}

}  // namespace tokenmill::cuda
