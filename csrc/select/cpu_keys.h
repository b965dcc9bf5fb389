// Order-preserving unsigned integer keys of scores, and the n-th largest of them.
#pragma once
#include <algorithm>
#include <bit>

#include "cpu/simd.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr float kNegInf = -__builtin_inff();
constexpr int kMaxBins = 2048;

// NaN counts as -inf, -0 as 0. No key is 0 or 0xffffffff.
TM_INLINE uint32_t key_of(float x) {
  if (!(x > kNegInf)) x = kNegInf;
  const uint32_t bits = std::bit_cast<uint32_t>(x == 0 ? 0.f : x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
TM_INLINE float score_of(uint32_t key) {
  return std::bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Lanes of a mask as bits, lane 0 lowest.
TM_INLINE uint64_t bits_of(vm m) {
#if defined(__AVX512F__)
  return m;
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(m));
#else
  return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u);
#endif
}

// The rank-th largest key, rank from 1. Overwrites keys.
inline uint32_t nth_largest(uint32_t* keys, int64_t count, int64_t rank) {
  int32_t bins[kMaxBins];
  while (true) {
    uint32_t minimum = keys[0], maximum = keys[0];
    for (int64_t i = 1; i < count; ++i) {
      minimum = keys[i] < minimum ? keys[i] : minimum;
      maximum = keys[i] > maximum ? keys[i] : maximum;
    }
    const int width = std::bit_width(maximum - minimum);  // number of bits that differ
    if (width == 0) return minimum;
    const int count_width = std::bit_width(static_cast<uint64_t>(count));
    const int bits = count_width < 4 ? 4 : count_width > 11 ? 11 : count_width;
    const int shift = width > bits ? width - bits : 0;
    for (int bin = 0; bin < 1 << bits; ++bin) bins[bin] = 0;
    for (int64_t i = 0; i < count; ++i) ++bins[(keys[i] - minimum) >> shift];
    uint32_t bin = (maximum - minimum) >> shift;
    for (; bins[bin] < rank; --bin) rank -= bins[bin];
    if (shift == 0) return minimum + bin;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      keys[kept] = keys[i];
      kept += (keys[i] - minimum) >> shift == bin;
    }
    count = kept;
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
