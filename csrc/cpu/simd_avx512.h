#pragma once
#include <immintrin.h>

namespace tokenmill::TOKENMILL_ISA {

using vf = __m512;
using vm = __mmask16;
constexpr int kWidth = 16;
constexpr int kTileRows = 6;  // 6 x 4 accumulators, 4 operands, 1 broadcast of 32 registers
constexpr int kTileVectors = 4;

TM_INLINE vf set(float x) { return _mm512_set1_ps(x); }
TM_INLINE vf zero() { return _mm512_setzero_ps(); }
TM_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
TM_INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
TM_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
TM_INLINE vf max_of(vf a, vf b) { return _mm512_max_ps(a, b); }
TM_INLINE vf min_of(vf a, vf b) { return _mm512_min_ps(a, b); }
TM_INLINE vf abs_of(vf a) { return _mm512_abs_ps(a); }
TM_INLINE vm less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
TM_INLINE vm equal(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
TM_INLINE vf select(vm m, vf x, vf y) { return _mm512_mask_blend_ps(m, y, x); }
TM_INLINE vm either(vm a, vm b) { return a | b; }
TM_INLINE bool any(vm m) { return m != 0; }
TM_INLINE vm lanes(int64_t begin, int64_t end) {
  const uint32_t below_end = end <= 0 ? 0 : end >= 16 ? 0xffffu : (1u << end) - 1;
  const uint32_t below_begin = begin <= 0 ? 0 : begin >= 16 ? 0xffffu : (1u << begin) - 1;
  return static_cast<vm>(below_end & ~below_begin);
}
// Stores first + lane for each lane of the mask, in order. Returns their number; writes kWidth.
TM_INLINE int store_lane_numbers(int32_t* to, int32_t first, vm m) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(first), lane);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(m, numbers));
  return __builtin_popcount(m);
}
TM_INLINE float first(vf x) { return _mm512_cvtss_f32(x); }
TM_INLINE float sum_lanes(vf x) { return _mm512_reduce_add_ps(x); }
TM_INLINE float max_lanes(vf x) { return _mm512_reduce_max_ps(x); }
// Lane i is the sum of the lanes of x[i].
TM_INLINE vf sum_each(const vf (&x)[16]) {
  __m512d pair[8];
  TM_UNROLL(8)
  for (int i = 0; i < 8; ++i)
    pair[i] = _mm512_castps_pd(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) +
                               _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  vf four[4], eight[2];
  TM_UNROLL(4)
  for (int i = 0; i < 4; ++i)
    four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair[2 * i], pair[2 * i + 1])) +
              _mm512_castpd_ps(_mm512_unpackhi_pd(pair[2 * i], pair[2 * i + 1]));
  TM_UNROLL(2)
  for (int i = 0; i < 2; ++i)
    eight[i] = _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x44) +
               _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xee);
  return _mm512_shuffle_f32x4(eight[0], eight[1], 0x88) +
         _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd);
}
TM_INLINE vf iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
TM_INLINE vf reciprocal_approx(vf x) { return _mm512_rcp14_ps(x); }

constexpr bool kSplitByFloor = true;
struct Exp2Split {
  vf fraction, t;
};
// Faster than vreduceps on Zen 4 (8.9 vs. 10.4 cycles per sigmoid). The maximum turns inf - inf
// into 0; vscalefps, which takes the floor of t itself, still sees inf and NaN.
TM_INLINE Exp2Split split_exp2(vf t) {
  const vf floor = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEG_INF);
  return {_mm512_max_ps(t - floor, _mm512_setzero_ps()), t};
}
TM_INLINE vf scale_exp2(vf p, const Exp2Split& s) { return _mm512_scalef_ps(p, s.t); }

TM_INLINE vf load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
TM_INLINE void store_half(uint16_t* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
TM_INLINE vf load_bfloat(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
// Round to nearest even in the integer domain; a NaN stays a quiet NaN.
TM_INLINE __m512i bfloat_bits(vf x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const vm nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_srli_epi32(rounded, 16);
}
TM_INLINE void store_bfloat(uint16_t* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bfloat_bits(x)));
}

// Transposes kWidth x kWidth 32-bit words held one row per register.
TM_INLINE void transpose(vf (&rows)[16]) {
  __m512i r[16], t[16];
  TM_UNROLL(16)
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(rows[i]);
  TM_UNROLL(8)
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  TM_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  TM_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  TM_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
  TM_UNROLL(16)
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castsi512_ps(r[i]);
}

// Lane i of the result is the sum of the lanes of rows[i].
TM_INLINE vf sum_rows(const vf (&rows)[16]) {
  vf quads[4];  // lanes 4 j + i: a fourth of the sum of row 4 q + i
  TM_UNROLL(4)
  for (int q = 0; q < 4; ++q) {
    const vf* r = rows + 4 * q;
    const vf low = _mm512_unpacklo_ps(r[0], r[1]) + _mm512_unpackhi_ps(r[0], r[1]);
    const vf high = _mm512_unpacklo_ps(r[2], r[3]) + _mm512_unpackhi_ps(r[2], r[3]);
    quads[q] = _mm512_shuffle_ps(low, high, 0x44) + _mm512_shuffle_ps(low, high, 0xee);
  }
  const vf first = _mm512_shuffle_f32x4(quads[0], quads[1], 0x88) +
                   _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd);
  const vf second = _mm512_shuffle_f32x4(quads[2], quads[3], 0x88) +
                    _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd);
  return _mm512_shuffle_f32x4(first, second, 0x88) + _mm512_shuffle_f32x4(first, second, 0xdd);
}

#if defined(__AVX512BF16__)
// Two bfloat16 products per 32-bit word and lane, accumulated in float32.
TM_INLINE vf dot_bfloat(vf acc, vf a, vf b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// Words (first + i, second + i), i the lane: indices of 16-bit elements.
TM_INLINE __m512i element_pairs(int first, int second) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)),
                          _mm512_set1_epi32(first + (second << 16)));
}
// Rounds lo and hi to bfloat16: word i is the pair (lo[i], hi[i]).
TM_INLINE vf pair_bfloat(vf lo, vf hi) {
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi, lo));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(element_pairs(0, 16), halves));
}
// Words (even[i], odd[i]) of the 16-bit elements 0 to 15, or 16 to 31 if `upper`.
TM_INLINE vf interleave(vf even, vf odd, bool upper) {
  const __m512i order = upper ? element_pairs(16, 48) : element_pairs(0, 32);
  return _mm512_castsi512_ps(
      _mm512_permutex2var_epi16(_mm512_castps_si512(even), order, _mm512_castps_si512(odd)));
}
TM_INLINE void store_narrow(uint16_t* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
// Words (a, b) of the 32 columns of two rows; `low` gets columns 0-3, 8-11, 16-19 and 24-27.
TM_INLINE void interleave_bfloat(vf a, vf b, vf& low, vf& high) {
  const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
  low = _mm512_castsi512_ps(_mm512_unpacklo_epi16(x, y));
  high = _mm512_castsi512_ps(_mm512_unpackhi_epi16(x, y));
}
// Restores the column order after interleave_bfloat: 0-15 in `low`.
TM_INLINE void restore_columns(vf& low, vf& high) {
  const vf front = _mm512_shuffle_f32x4(low, high, 0x44);
  const vf back = _mm512_shuffle_f32x4(low, high, 0xee);
  low = _mm512_shuffle_f32x4(front, front, 0xd8);
  high = _mm512_shuffle_f32x4(back, back, 0xd8);
}
// Rounds 32 floats to 16 words, in order.
TM_INLINE vf narrow_bfloat(vf first_half, vf second_half) {
  return reinterpret_cast<vf>(_mm512_cvtne2ps_pbh(second_half, first_half));
}
// Rounds like narrow_bfloat, result in float32.
TM_INLINE vf round_bfloat(vf x) {
  const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#endif

constexpr unsigned kFlushBits = 0x8040;  // FTZ and DAZ
TM_INLINE unsigned read_float_mode() { return _mm_getcsr(); }
TM_INLINE void write_float_mode(unsigned m) { _mm_setcsr(m); }

}  // namespace tokenmill::TOKENMILL_ISA
