#pragma once
#include <immintrin.h>

namespace tokenmill::TOKENMILL_ISA {

using vf = __m256;
using vm = __m256;
constexpr int kWidth = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 operands, 1 broadcast of 16 registers
constexpr int kTileVectors = 2;

TM_INLINE vf set(float x) { return _mm256_set1_ps(x); }
TM_INLINE vf zero() { return _mm256_setzero_ps(); }
TM_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
TM_INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
TM_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
TM_INLINE vf max_of(vf a, vf b) { return _mm256_max_ps(a, b); }
TM_INLINE vf min_of(vf a, vf b) { return _mm256_min_ps(a, b); }
TM_INLINE vf abs_of(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
TM_INLINE vm less(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
TM_INLINE vm equal(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
TM_INLINE vf select(vm m, vf x, vf y) { return _mm256_blendv_ps(y, x, m); }
TM_INLINE vm either(vm a, vm b) { return _mm256_or_ps(a, b); }
TM_INLINE bool any(vm m) { return _mm256_movemask_ps(m) != 0; }
TM_INLINE vf iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
TM_INLINE vm lanes(int64_t begin, int64_t end) {
  const auto clamp = [](int64_t i) { return static_cast<float>(i < 0 ? 0 : i > 8 ? 8 : i); };
  return _mm256_andnot_ps(less(iota(), set(clamp(begin))), less(iota(), set(clamp(end))));
}
// Stores first + lane for each lane of the mask, in order. Returns their number; writes at most
// kWidth.
TM_INLINE int store_lane_numbers(int32_t* to, int32_t first, vm m) {
  int count = 0;
  for (unsigned bits = _mm256_movemask_ps(m); bits; bits &= bits - 1)
    to[count++] = first + __builtin_ctz(bits);
  return count;
}
TM_INLINE float first(vf x) { return _mm256_cvtss_f32(x); }
TM_INLINE float sum_lanes(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
// Lane i is the sum of the lanes of x[i].
TM_INLINE vf sum_each(const vf (&x)[8]) {
  const vf low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const vf high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
}
TM_INLINE float max_lanes(vf x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
TM_INLINE vf reciprocal_approx(vf x) {  // 12 bits of vrcpps and one Newton step
  const vf r = _mm256_rcp_ps(x);
  const vf refined = r * _mm256_fnmadd_ps(r, x, set(2.f));
  return select(less(x, set(1e38f)), refined, set(1.f) / x);
}

constexpr bool kSplitByFloor = false;
struct Exp2Split {
  vf fraction;
  __m256i exponent;
};
// Rounds by adding 1.5 * 2^23: the low bits of the sum then hold the integer part.
TM_INLINE Exp2Split split_exp2(vf t) {
  t = max_of(set(-127.f), min_of(set(128.f), t));
  const vf shifted = t + set(12582912.f);
  return {t - (shifted - set(12582912.f)), _mm256_castps_si256(shifted)};
}
TM_INLINE vf scale_exp2(vf p, const Exp2Split& s) {
  const __m256i power =
      _mm256_add_epi32(_mm256_slli_epi32(s.exponent, 23), _mm256_set1_epi32(0x3f800000));
  return p * _mm256_castsi256_ps(power);
}

TM_INLINE vf load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TM_INLINE void store_half(uint16_t* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
TM_INLINE vf load_bfloat(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
// Round to nearest even in the integer domain; a NaN stays a quiet NaN.
TM_INLINE void store_bfloat(uint16_t* p, vf x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const vm nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256i result = _mm256_srli_epi32(
      _mm256_castps_si256(select(nan, _mm256_castsi256_ps(quiet), _mm256_castsi256_ps(rounded))),
      16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// Transposes kWidth x kWidth 32-bit words held one row per register.
TM_INLINE void transpose(vf (&r)[8]) {
  vf t[8];
  TM_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  TM_UNROLL(2)
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  TM_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
  }
  TM_UNROLL(8)
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Lane i of the result is the sum of the lanes of rows[i].
TM_INLINE vf sum_rows(const vf (&rows)[8]) {
  vf quads[2];
  TM_UNROLL(2)
  for (int q = 0; q < 2; ++q) {
    const vf* r = rows + 4 * q;
    quads[q] = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  }
  return _mm256_permute2f128_ps(quads[0], quads[1], 0x20) +
         _mm256_permute2f128_ps(quads[0], quads[1], 0x31);
}

constexpr unsigned kFlushBits = 0x8040;  // FTZ and DAZ
TM_INLINE unsigned read_float_mode() { return _mm_getcsr(); }
TM_INLINE void write_float_mode(unsigned m) { _mm_setcsr(m); }

}  // namespace tokenmill::TOKENMILL_ISA
