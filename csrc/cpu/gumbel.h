// Gumbel noise from counters: Philox4x32-10 (Salmon et al. 2011), the same words as
// python/tokenmill/reference/select/gumbel.py.
#pragma once
#include "cpu/simd.h"

namespace tokenmill::TOKENMILL_ISA {

typedef uint32_t vu __attribute__((vector_size(4 * kWidth)));

struct WidePair {
  vu high, low;
};

// 64-bit products of each lane with m.
TM_INLINE WidePair multiply_wide(vu x, uint32_t m) {
#if defined(__AVX512F__)
  const __m512i a = (__m512i)x, f = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(a, f);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), f);
  return {(vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd),
          (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
#elif defined(__AVX2__)
  const __m256i a = (__m256i)x, f = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(a, f);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), f);
  return {(vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa),
          (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
#else
  WidePair y;
  for (int i = 0; i < kWidth; ++i) {
    const uint64_t wide = static_cast<uint64_t>(x[i]) * m;
    y.high[i] = static_cast<uint32_t>(wide >> 32);
    y.low[i] = static_cast<uint32_t>(wide);
  }
  return y;
#endif
}

// First output word of Philox for counters (b, h, i, j), (b, h, i, j + 1), ... under a key.
TM_INLINE vu philox(uint64_t key, uint32_t b, uint32_t h, uint32_t i, uint32_t j) {
  vu c0 = vu{} + b, c1 = vu{} + h, c2 = vu{} + i, c3;
  for (int lane = 0; lane < kWidth; ++lane) c3[lane] = j + lane;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  TM_UNROLL(10)
  for (int round = 0; round < 10; ++round) {
    const WidePair x = multiply_wide(c0, 0xD2511F53u), y = multiply_wide(c2, 0xCD9E8D57u);
    c0 = y.high ^ c1 ^ k0;
    c1 = y.low;
    c2 = x.high ^ c3 ^ k1;
    c3 = x.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// log2 of positive normal numbers; relative error 2^-22 also around 1, where the result vanishes.
TM_INLINE vf log2(vf x) {
  typedef int32_t vi __attribute__((vector_size(4 * kWidth)));
  typedef float vg __attribute__((vector_size(4 * kWidth)));
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)).
  const vi e = ((vi)x - 0x3f3504f3) >> 23;
  const vf m = (vf)((vi)x - (e << 23));
  const vf s = (m - set(1.f)) / (m + set(1.f)), u = s * s;
  vf p = set(0.320598898f);  // 2 / (ln 2 (2 n + 1)), the series of 2 atanh(s) / ln 2
  p = fma(p, u, set(0.412198583f));
  p = fma(p, u, set(0.577078016f));
  p = fma(p, u, set(0.961796694f));
  p = fma(p, u, set(2.88539008f));
  return fma(p, s, (vf) __builtin_convertvector(e, vg));
}

// -log(-log u) in bits, u in the middle of one of 2^23 parts of (0, 1).
TM_INLINE vf gumbel_bits(vu words) {
  const vf u = (vf)((words >> 9) | 0x3f800000u) - set(0.99999994f);  // exact
  constexpr float kLog2OfLn2 = -0.528766373f;
  return set(-kLog2OfLn2) - log2(zero() - log2(u));
}

}  // namespace tokenmill::TOKENMILL_ISA
