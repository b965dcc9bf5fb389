// MMA by one warp: d[16][8] += a[16][k] b[k][8], float32 accumulators. k is 16 for 16-bit elements
// and 8 for float, whose products are three tf32 products each.
//
// Lane l: g = l / 4, c = l % 4. Accumulators: d[g][2c], d[g][2c + 1], d[g + 8][2c], d[g + 8][2c +
// 1]. 16-bit words hold elements 2c, 2c + 1 (words 0, 1 of a: rows g, g + 8; word 0 of b: column g)
// and 2c + 8, 2c + 9 (words 2, 3 of a; word 1 of b). float: elements c and c + 4 in the same
// places. The order of k is free as long as a and b agree: packed accumulators are the fragment a
// of the next product if b orders its rows in the same way (float: 2c, 2c + 1 for c, c + 4), and 16
// bytes that a lane loads from a row of a and of b serve 32 / 16 (float) consecutive elements.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm80.hpp>

namespace tokenmill::cuda {

template <typename T>
constexpr int kMmaDepth = sizeof(T) == 4 ? 8 : 16;

// kWords words per lane: 4 for a, 2 for b.
template <typename T, int kWords>
struct Fragment {
  uint32_t words[kWords];
};

// x = high + low up to 2^-22 x, both tf32.
template <int kWords>
struct Fragment<float, kWords> {
  uint32_t high[kWords], low[kWords];
};

// volatile: hoisted out of a loop, the two halves would take twice the registers.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t word;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}

template <typename T, typename... Words>
__device__ __forceinline__ Fragment<T, sizeof...(Words)> make_fragment(Words... words) {
  if constexpr (sizeof(T) == 2) {
    return {{words...}};
  } else {
    Fragment<float, sizeof...(Words)> f{{words...}, {}};
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof...(Words)); ++i) {
      const float x = __uint_as_float(f.high[i]);
      f.high[i] = round_to_tf32(x);
      f.low[i] = round_to_tf32(x - __uint_as_float(f.high[i]));
    }
    return f;
  }
}

template <typename Atom>
__device__ __forceinline__ void mma_words(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  Atom::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3]);
}

__device__ __forceinline__ void mma(float (&d)[4], const Fragment<__half, 4>& a,
                                    const Fragment<__half, 2>& b) {
  mma_words<cute::SM80_16x8x16_F32F16F16F32_TN>(d, a.words, b.words);
}

__device__ __forceinline__ void mma(float (&d)[4], const Fragment<__nv_bfloat16, 4>& a,
                                    const Fragment<__nv_bfloat16, 2>& b) {
  mma_words<cute::SM80_16x8x16_F32BF16BF16F32_TN>(d, a.words, b.words);
}

__device__ __forceinline__ void mma(float (&d)[4], const Fragment<float, 4>& a,
                                    const Fragment<float, 2>& b) {
  using Atom = cute::SM80_16x8x8_F32TF32TF32F32_TN;
  mma_words<Atom>(d, a.low, b.high);
  mma_words<Atom>(d, a.high, b.low);
  mma_words<Atom>(d, a.high, b.high);
}

// d = a b + c
template <typename T>
__device__ __forceinline__ void mma_from(float (&d)[4], const Fragment<T, 4>& a,
                                         const Fragment<T, 2>& b, const float (&c)[4]) {
  if constexpr (sizeof(T) == 2) {
    using Atom = std::conditional_t<std::is_same_v<T, __half>, cute::SM80_16x8x16_F32F16F16F32_TN,
                                    cute::SM80_16x8x16_F32BF16BF16F32_TN>;
    Atom::fma(d[0], d[1], d[2], d[3], a.words[0], a.words[1], a.words[2], a.words[3], b.words[0],
              b.words[1], c[0], c[1], c[2], c[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = c[i];
    mma(d, a, b);
  }
}

}  // namespace tokenmill::cuda
