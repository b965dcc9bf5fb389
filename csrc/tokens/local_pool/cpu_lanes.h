// Vectors of elements as integers, in the order of the elements; 16-bit elements are widened to two
// vectors of floats. Float i of half h is element 2 i + h, which needs no shuffles.
#pragma once
#include <type_traits>

#include "cpu/simd.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

typedef int32_t vi __attribute__((vector_size(4 * kWidth)));

template <DType kType>
struct Lanes {
  static constexpr bool kWide = kType == DType::float32;
  using Key = std::conditional_t<kWide, int32_t, int16_t>;
  typedef Key vk __attribute__((vector_size(4 * kWidth)));
  static constexpr int kHalves = kWide ? 1 : 2, kCount = kWidth * kHalves;
  static constexpr Key kMaximum = kWide ? 0x7fffffff : 0x7fff;
  static constexpr Key kNone = -kMaximum - 1;  // smaller than all keys
  static constexpr Key kInfinity = kWide ? 0x7f800000 : kType == DType::float16 ? 0x7c00 : 0x7f80;

  static TM_INLINE vk all(Key x) { return vk{} + x; }
  static TM_INLINE vk load(const void* p) {
    vk x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static TM_INLINE void store(void* p, vk x) { std::memcpy(p, &x, sizeof x); }
  // The first n elements; the rest is zero and not read.
  static TM_INLINE vk load_n(const void* p, int64_t n) {
    if (n >= kCount) return load(p);
    Key lane[kCount] = {};
    std::memcpy(lane, p, n * sizeof(Key));
    return load(lane);
  }
  static TM_INLINE void store_n(void* p, vk x, int64_t n) {
    if (n >= kCount) return store(p, x);
    Key lane[kCount];
    store(lane, x);
    std::memcpy(p, lane, n * sizeof(Key));
  }

  // Order-preserving keys: -0 and 0 are equal, and all NaN are equal and the maximum.
  static TM_INLINE vk keys(vk x) {
    if constexpr (kWide) {
      const vf number = (vf)x + zero();  // -0 + 0 is 0
      const vk bits = (vk)number;
      return (vk)select(equal(number, number), (vf)(bits ^ ((bits >> 31) & kMaximum)),
                        (vf)all(kInfinity + 1));
    }
    vk key = x ^ ((x >> (8 * sizeof(Key) - 1)) & kMaximum);
    key -= key == all(-1);
    return (x & kMaximum) > all(kInfinity) ? all(kInfinity + 1) : key;
  }

  static TM_INLINE void widen(vk x, vf (&to)[kHalves]) {
    const vi words = (vi)x;
    if constexpr (kType == DType::float32) {
      to[0] = (vf)words;
    } else if constexpr (kType == DType::bfloat16) {
      to[0] = (vf)(words << 16);
      to[1] = (vf)(words & static_cast<int32_t>(0xffff0000));
    } else {
#if defined(__AVX512F__)
      const __m512i bits = reinterpret_cast<__m512i>(x);
      to[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
      to[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
#elif defined(__AVX2__)
      const __m256i bits = reinterpret_cast<__m256i>(x);
      const __m256i low = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff));
      const __m256i both =
          _mm256_permute4x64_epi64(_mm256_packus_epi32(low, _mm256_srli_epi32(bits, 16)), 0xd8);
      to[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(both));
      to[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
#else
      float lane[2][kWidth];
      for (int i = 0; i < kCount; ++i)
        lane[i % 2][i / 2] = half_to_float(static_cast<uint16_t>(x[i]));
      for (int h = 0; h < 2; ++h) to[h] = TOKENMILL_ISA::load(lane[h]);
#endif
    }
  }
  static TM_INLINE vk narrow(const vf (&from)[kHalves]) {
    if constexpr (kType == DType::float32) {
      return (vk)from[0];
    } else if constexpr (kType == DType::bfloat16) {
      const vi low = rounded(from[0]), high = rounded(from[1]);
      return (vk)((low >> 16 & 0xffff) | (high & static_cast<int32_t>(0xffff0000)));
    } else {
#if defined(__AVX512F__)
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(from[0], 0));
      const __m512i high = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(from[1], 0));
      return reinterpret_cast<vk>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#elif defined(__AVX2__)
      const __m256i low = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(from[0], 0));
      const __m256i high = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(from[1], 0));
      return reinterpret_cast<vk>(_mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
#else
      vk to{};
      for (int i = 0; i < kCount; ++i) to[i] = static_cast<Key>(float_to_half(from[i % 2][i / 2]));
      return to;
#endif
    }
  }

  // x where half h of `found` equals `number`, 0 elsewhere.
  static TM_INLINE vf where_equal(vk found, vk number, int h, vf x) {
    const vi differing = (vi)(found ^ number);
    const int32_t bits = kWide ? -1 : h == 0 ? 0xffff : static_cast<int32_t>(0xffff0000);
    return (vf)((vi)x & ((differing & bits) == 0));
  }

 private:
  // Upper 16 bits of a float, rounded to nearest even; a NaN stays a quiet NaN.
  static TM_INLINE vi rounded(vf x) {
    const vi bits = (vi)x, maximum = bits & 0x7fffffff;
    const vi up = bits + ((bits >> 16) & 1) + 0x7fff;
    return maximum > 0x7f800000 ? bits | 0x400000 : up;
  }
};

}  // namespace
}  // namespace tokenmill::TOKENMILL_ISA
