// float8_e4m3fn by bit arithmetic: sign, 4 exponent bits with bias 7, 3 mantissa bits. There is no
// infinity; 0x7f and 0xff are NaN, 448 (0x7e) is the largest number. The float mode
// (FlushDenormals) changes no result.
//
//   load_float8    kWidth codes as floats, exact
//   load_codes     2 kWidth finite codes as floats, times kCodeUnit, in half of the time
//   NanCodes       detects NaN, which load_codes would read as 480
//   store_float8   kWidth floats rounded to nearest even, saturated at +-448; NaN becomes 0x7f
#pragma once
#include "cpu/simd.h"

namespace tokenmill::TOKENMILL_ISA {

typedef int32_t float8_words __attribute__((vector_size(sizeof(vf))));
typedef uint8_t float8_codes __attribute__((vector_size(kWidth)));

TM_INLINE vf load_float8(const uint8_t* p) {
  float8_codes codes;
  std::memcpy(&codes, p, sizeof codes);
  const auto code = __builtin_convertvector(codes, float8_words);
  const float8_words magnitude = code & 0x7f, sign = (code & 0x80) << 24;
  // Codes below 8 are 0 and the subnormal numbers, multiples of 2^-9.
  const auto small = (float8_words)((vf) __builtin_convertvector(magnitude, vf) * set(0x1p-9f));
  const float8_words normal = (magnitude << 20) + ((127 - 7) << 23);
  const float8_words bits = magnitude < 8 ? small : normal;
  return (vf)((magnitude == 0x7f ? float8_words{} + 0x7fc00000 : bits) | sign);
}

// A code shifted up by 7 bits is a float16 with 2^-8 times its value, also for subnormal codes; the
// conversion from float16 ignores the float mode.
constexpr float kCodeUnit = 0x1p-8f;
TM_INLINE void load_codes(const uint8_t* p, vf& low, vf& high) {
#if defined(__AVX512F__)
  const __m512i codes =
      _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i sign_extended = _mm512_slli_epi16(codes, 7);
  const __m512i halves = _mm512_and_si512(sign_extended, _mm512_set1_epi16(-0x4001));
  low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
#elif defined(__AVX2__)
  const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i sign_extended = _mm256_slli_epi16(codes, 7);
  const __m256i halves = _mm256_and_si256(sign_extended, _mm256_set1_epi16(-0x4001));
  low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#else
  low = load_float8(p) * set(kCodeUnit);
  high = load_float8(p + kWidth) * set(kCodeUnit);
#endif
}

// Detects NaN among codes, 4 kWidth at a time: adding 1 flips the sign bit only of NaN codes.
class NanCodes {
 public:
  static constexpr int kCount = sizeof(vf);
  TM_INLINE void add(const uint8_t* p) {
    Codes codes;
    std::memcpy(&codes, p, sizeof codes);
    flipped_ |= (codes + 1) ^ codes;
  }
  TM_INLINE bool any() const {
#if defined(__AVX512F__)
    return _mm512_movepi8_mask((__m512i)flipped_) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8((__m256i)flipped_) != 0;
#else
    uint64_t halves[2];
    std::memcpy(halves, &flipped_, sizeof halves);
    return ((halves[0] | halves[1]) & 0x8080808080808080u) != 0;
#endif
  }

 private:
  typedef uint8_t Codes __attribute__((vector_size(sizeof(vf))));
  Codes flipped_ = {};
};
TM_INLINE bool is_nan_code(uint8_t code) { return (code & 0x7f) == 0x7f; }

// The low byte of each word.
TM_INLINE void store_low_bytes(uint8_t* p, float8_words words) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // GCC 12 would split the conversion
  const __m128i low = _mm256_castsi256_si128((__m256i)words);
  const __m128i halves = _mm_packus_epi32(low, _mm256_extracti128_si256((__m256i)words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
#else
  const auto bytes = __builtin_convertvector(words, float8_codes);
  std::memcpy(p, &bytes, sizeof bytes);
#endif
}

TM_INLINE void store_float8(uint8_t* p, vf x) {
  const float8_words bits = (float8_words)x, magnitude = bits & 0x7fffffff;
  const float8_words maximum = float8_words{} + 0x43e00000;  // 448
  const float8_words cut = magnitude < maximum ? magnitude : maximum;
  // Subnormal, below 2^-6: the last bit of a sum with 2^14 is worth 2^-9.
  const float8_words small = (float8_words)((vf)cut + set(0x1p14f)) - 0x46800000;
  const float8_words normal = ((cut + 0x7ffff + (cut >> 20 & 1)) >> 20) - ((127 - 7) << 3);
  const float8_words code = (cut < 0x3c800000 ? small : normal) | (bits >> 24 & 0x80);
  store_low_bytes(p, magnitude > 0x7f800000 ? float8_words{} + 0x7f : code);
}

template <>
struct Elements<DType::float8_e4m3fn> {
  using type = uint8_t;
  static constexpr bool kIsBFloat = false;
  static TM_INLINE vf load(const void* p, int64_t i) {
    return load_float8(static_cast<const uint8_t*>(p) + i);
  }
  static TM_INLINE void store(void* p, int64_t i, vf x) {
    store_float8(static_cast<uint8_t*>(p) + i, x);
  }
  static TM_INLINE vf load_n(const void* p, int64_t i, int64_t n) {
    if (n >= kWidth) return load(p, i);
    uint8_t lane[kWidth] = {};
    for (int64_t l = 0; l < n; ++l) lane[l] = static_cast<const uint8_t*>(p)[i + l];
    return load(lane, 0);
  }
  static TM_INLINE void store_n(void* p, int64_t i, vf x, int64_t n) {
    if (n >= kWidth) return store(p, i, x);
    uint8_t lane[kWidth];
    store(lane, 0, x);
    for (int64_t l = 0; l < n; ++l) static_cast<uint8_t*>(p)[i + l] = lane[l];
  }
};

// Converts a row of `length` elements of any type to floats times `factor`, zero-filled to `width`.
__attribute__((noinline)) inline void widen_row(const void* from, DType type, int64_t length,
                                                float factor, float* to, int64_t width) {
  const vf f = set(factor);
  const auto widen = [&](auto e) TM_LAMBDA {
    for (int64_t i = 0; i < width; i += kWidth) store(to + i, e.load_n(from, i, length - i) * f);
  };
  type == DType::float8_e4m3fn ? widen(Elements<DType::float8_e4m3fn>())
                               : visit_elements(type, widen);
}

}  // namespace tokenmill::TOKENMILL_ISA
