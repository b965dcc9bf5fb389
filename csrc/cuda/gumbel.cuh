// Gumbel noise from counters: Philox4x32-10 (Salmon et al. 2011), the same words as
// python/tokenmill/reference/select/gumbel.py.
#pragma once
#include "cuda/arch/opaque.cuh"
#include "cuda/math.cuh"

namespace tokenmill::cuda {

// First output word of Philox for a counter and a key.
__device__ __forceinline__ uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                           uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  opt_barrier(k0);  // precomputed keys of all rounds would hold 20 registers
  opt_barrier(k1);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// log2 of a positive normal number; relative error 2^-22 also around 1, where the result vanishes.
__device__ __forceinline__ float log2_accurate(float x) {
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)).
  const int e = (__float_as_int(x) - 0x3f3504f3) >> 23;
  const float m = __int_as_float(__float_as_int(x) - (e << 23));
  const float s = (m - 1) * reciprocal_approx(m + 1), u = s * s;
  float p = 0.320598898f;  // 2 / (ln 2 (2 n + 1)), the series of 2 atanh(s) / ln 2
  p = fmaf(p, u, 0.412198583f);
  p = fmaf(p, u, 0.577078016f);
  p = fmaf(p, u, 0.961796694f);
  p = fmaf(p, u, 2.88539008f);
  return fmaf(p, s, static_cast<float>(e));
}

// -log(-log u) in bits, u in the middle of one of 2^23 parts of (0, 1).
__device__ __forceinline__ float gumbel_bits(uint32_t word) {
  const float u = __int_as_float(word >> 9 | 0x3f800000u) - 0.99999994f;  // exact
  constexpr float kLog2OfLn2 = -0.528766373f;
  return -kLog2OfLn2 - log2_accurate(-log2_accurate(u));
}

}  // namespace tokenmill::cuda
