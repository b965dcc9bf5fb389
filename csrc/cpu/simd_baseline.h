// GCC vector extensions: SSE2 on x86-64, NEON on AArch64, plain code elsewhere.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tokenmill::TOKENMILL_ISA {

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vm __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;

TM_INLINE vf set(float x) { return vf{x, x, x, x}; }
TM_INLINE vf zero() { return vf{}; }
TM_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
TM_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
TM_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
TM_INLINE vf select(vm m, vf x, vf y) { return (vf)((m & (vm)x) | (~m & (vm)y)); }
TM_INLINE vm less(vf a, vf b) { return a < b; }
TM_INLINE vm equal(vf a, vf b) { return a == b; }
TM_INLINE vf max_of(vf a, vf b) { return select(a > b, a, b); }
TM_INLINE vf min_of(vf a, vf b) { return select(a < b, a, b); }
TM_INLINE vf abs_of(vf a) { return (vf)((vm)a & 0x7fffffff); }
TM_INLINE vm either(vm a, vm b) { return a | b; }
TM_INLINE bool any(vm m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
TM_INLINE vf iota() { return vf{0, 1, 2, 3}; }
TM_INLINE vm lanes(int64_t begin, int64_t end) {
  const auto clamp = [](int64_t i) { return static_cast<float>(i < 0 ? 0 : i > 4 ? 4 : i); };
  return (iota() >= set(clamp(begin))) & (iota() < set(clamp(end)));
}
// Stores first + lane for each lane of the mask, in order. Returns their number; writes at most
// kWidth.
TM_INLINE int store_lane_numbers(int32_t* to, int32_t first, vm m) {
  int count = 0;
  for (int lane = 0; lane < kWidth; ++lane) {
    to[count] = first + lane;
    count += m[lane] & 1;
  }
  return count;
}
TM_INLINE float first(vf x) { return x[0]; }
TM_INLINE float sum_lanes(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
// Lane i is the sum of the lanes of x[i].
TM_INLINE vf sum_each(const vf (&x)[4]) {
  return vf{sum_lanes(x[0]), sum_lanes(x[1]), sum_lanes(x[2]), sum_lanes(x[3])};
}
TM_INLINE float max_lanes(vf x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
TM_INLINE vf reciprocal_approx(vf x) { return set(1.f) / x; }

constexpr bool kSplitByFloor = false;
struct Exp2Split {
  vf fraction;
  vm exponent;
};
// Rounds by adding 1.5 * 2^23: the low bits of the sum then hold the integer part.
TM_INLINE Exp2Split split_exp2(vf t) {
  t = max_of(set(-127.f), min_of(set(128.f), t));
  const vf shifted = t + set(12582912.f);
  return {t - (shifted - set(12582912.f)), (vm)shifted};
}
TM_INLINE vf scale_exp2(vf p, const Exp2Split& s) {
  return p * (vf)((s.exponent << 23) + 0x3f800000);
}

TM_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) {  // inf, NaN
    const uint32_t bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  if (magnitude < 0x400) {  // subnormal: a multiple of 2^-24
    const float f = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  const uint32_t bits = sign | ((magnitude + 0x1c000) << 13);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
TM_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // below 2^-14: round to a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    const float shifted = magnitude + 0.5f;  // ulp of [0.5, 1) is 2^-24
    std::memcpy(&bits, &shifted, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - 0x38000000) >> 13);
}
TM_INLINE vf load_half(const uint16_t* p) {
  return vf{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
TM_INLINE void store_half(uint16_t* p, vf x) {
  for (int i = 0; i < 4; ++i) p[i] = float_to_half(x[i]);
}
TM_INLINE vf load_bfloat(const uint16_t* p) {
  return (vf)(vm{p[0] << 16, p[1] << 16, p[2] << 16, p[3] << 16});
}
// Round to nearest even in the integer domain; a NaN stays a quiet NaN.
TM_INLINE void store_bfloat(uint16_t* p, vf x) {
  const vm bits = (vm)x;
  const vm rounded = bits + ((bits >> 16) & 1) + 0x7fff;
  const vm nan = x != x;
  const vm result = (nan & (bits | 0x400000)) | (~nan & rounded);
  for (int i = 0; i < 4; ++i) p[i] = static_cast<uint16_t>(result[i] >> 16);
}

// Transposes kWidth x kWidth 32-bit words held one row per register.
TM_INLINE void transpose(vf (&r)[4]) {
  const vf a = __builtin_shuffle(r[0], r[1], vm{0, 4, 1, 5});
  const vf b = __builtin_shuffle(r[0], r[1], vm{2, 6, 3, 7});
  const vf c = __builtin_shuffle(r[2], r[3], vm{0, 4, 1, 5});
  const vf d = __builtin_shuffle(r[2], r[3], vm{2, 6, 3, 7});
  r[0] = __builtin_shuffle(a, c, vm{0, 1, 4, 5});
  r[1] = __builtin_shuffle(a, c, vm{2, 3, 6, 7});
  r[2] = __builtin_shuffle(b, d, vm{0, 1, 4, 5});
  r[3] = __builtin_shuffle(b, d, vm{2, 3, 6, 7});
}

// Lane i of the result is the sum of the lanes of rows[i].
TM_INLINE vf sum_rows(vf (&rows)[4]) {
  transpose(rows);
  return (rows[0] + rows[1]) + (rows[2] + rows[3]);
}

#if defined(__SSE2__)
constexpr unsigned kFlushBits = 0x8040;  // FTZ and DAZ
TM_INLINE unsigned read_float_mode() { return _mm_getcsr(); }
TM_INLINE void write_float_mode(unsigned m) { _mm_setcsr(m); }
#else
constexpr unsigned kFlushBits = 0;
TM_INLINE unsigned read_float_mode() { return 0; }
TM_INLINE void write_float_mode(unsigned) {}
#endif

}  // namespace tokenmill::TOKENMILL_ISA
