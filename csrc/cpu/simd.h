// SIMD abstraction: one vector type per instruction set, under the same names in each namespace.
//
//   vf            kWidth floats           vm           a lane mask
//   load store    unaligned               load_n/store_n   the first n lanes, zero-filled
//   lanes(b, e)   mask of lanes b..e-1    select(m, x, y)  m ? x : y
//   sum_rows      kWidth sums of lanes    transpose        of kWidth vectors
//   exp2<degree>  2^t, relative error 7.5e-5 (degree 3) or 9.2e-8 (5); NaN, +-inf as in IEEE
//
// Operand order of max_of/min_of matters: a NaN in the second operand survives.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#define TM_INLINE inline __attribute__((always_inline))
#define TM_LAMBDA __attribute__((always_inline))
#define TM_UNROLL(n) _Pragma(TM_STRINGIFY(GCC unroll n))
#define TM_STRINGIFY(x) #x

// Products of bfloat16 by vdpbf16ps. Where there are tiles (AMX), operators without tiles multiply
// in float32: on Intel cores that takes half of the time of vdpbf16ps (csrc/cpu/isa.cpp).
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define TM_DOTS
#endif

#if defined(__AVX512F__)
#include "cpu/simd_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_baseline.h"
#endif

namespace tokenmill::TOKENMILL_ISA {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

// Minimax coefficients of 2^r (constant term first), relative error as stated above. Degree 5 has
// 2^0 = 1 exactly: it is a rescale factor, and the weight of a row's only key. For r in [0, 1)
// (splits by floor) or [-1/2, 1/2] (splits by rounding).
template <bool kFloor, int kDegree>
struct Exp2Coefficients;
template <>
struct Exp2Coefficients<true, 3> {
  static constexpr float c[] = {0.9999252186f, 0.6958335405f, 0.2260671554f, 0.07802452269f};
};
template <>
struct Exp2Coefficients<true, 5> {
  static constexpr float c[] = {
      1.f, 0.6931513118f, 0.2401644501f, 0.05579991332f, 0.009017030019f, 0.001867130213f};
};
template <>
struct Exp2Coefficients<false, 3> {
  static constexpr float c[] = {0.9999280735f, 0.6932609855f, 0.2426111222f, 0.05517166909f};
};
template <>
struct Exp2Coefficients<false, 5> {
  static constexpr float c[] = {
      1.f, 0.6931469776f, 0.2402224208f, 0.05550733744f, 0.009671512688f, 0.001326472725f};
};

template <int kDegree>
TM_INLINE vf exp2(vf t) {
  using C = Exp2Coefficients<kSplitByFloor, kDegree>;
  const Exp2Split s = split_exp2(t);
  vf p = set(C::c[kDegree]);
  TM_UNROLL(8)
  for (int i = kDegree - 1; i >= 0; --i) p = fma(p, s.fraction, set(C::c[i]));
  return scale_exp2(p, s);
}

// tanh with relative error below 3e-7: an odd polynomial near 0, where 1 - 2/(1 + e^2x) cancels.
TM_INLINE vf tanh(vf x) {
  const vf u = x * x;
  vf p = set(-0.005852168625f);
  p = fma(p, u, set(0.02075362886f));
  p = fma(p, u, set(-0.0537687047f));
  p = fma(p, u, set(0.1333168896f));
  p = fma(p, u, set(-0.3333328326f));
  p = fma(p, u, set(0.9999999975f));
  const vf e = exp2<5>(x * set(2 * kLog2e));
  const vf large = set(1.f) - set(2.f) / (set(1.f) + e);
  return select(less(u, set(0.36f)), p * x, large);
}

// Elements of a tensor as floats: load, store, and both for only the first n of kWidth lanes (the
// rest zero, and neither read nor written).
template <DType kType>
struct Elements {
  using type = uint16_t;
  static constexpr bool kIsBFloat = kType == DType::bfloat16;
  static TM_INLINE vf load(const void* p, int64_t i) {
    const uint16_t* from = static_cast<const uint16_t*>(p) + i;
    return kType == DType::float16 ? load_half(from) : load_bfloat(from);
  }
  static TM_INLINE void store(void* p, int64_t i, vf x) {
    uint16_t* to = static_cast<uint16_t*>(p) + i;
    kType == DType::float16 ? store_half(to, x) : store_bfloat(to, x);
  }
  static TM_INLINE vf load_n(const void* p, int64_t i, int64_t n) {
    if (n >= kWidth) return load(p, i);
    uint16_t lane[kWidth] = {};
    for (int64_t l = 0; l < n; ++l) lane[l] = static_cast<const uint16_t*>(p)[i + l];
    return load(lane, 0);
  }
  static TM_INLINE void store_n(void* p, int64_t i, vf x, int64_t n) {
    if (n >= kWidth) return store(p, i, x);
    uint16_t lane[kWidth];
    store(lane, 0, x);
    for (int64_t l = 0; l < n; ++l) static_cast<uint16_t*>(p)[i + l] = lane[l];
  }
};
template <>
struct Elements<DType::float32> {
  using type = float;
  static constexpr bool kIsBFloat = false;
  static TM_INLINE vf load(const void* p, int64_t i) {
    return TOKENMILL_ISA::load(static_cast<const float*>(p) + i);
  }
  static TM_INLINE void store(void* p, int64_t i, vf x) {
    TOKENMILL_ISA::store(static_cast<float*>(p) + i, x);
  }
  static TM_INLINE vf load_n(const void* p, int64_t i, int64_t n) {
    if (n >= kWidth) return load(p, i);
    float lane[kWidth] = {};
    for (int64_t l = 0; l < n; ++l) lane[l] = static_cast<const float*>(p)[i + l];
    return load(lane, 0);
  }
  static TM_INLINE void store_n(void* p, int64_t i, vf x, int64_t n) {
    if (n >= kWidth) return store(p, i, x);
    float lane[kWidth];
    store(lane, 0, x);
    for (int64_t l = 0; l < n; ++l) static_cast<float*>(p)[i + l] = lane[l];
  }
};

// Calls visit(Elements<t>()): one branch outside the loop over elements.
template <typename Visit>
TM_INLINE auto visit_elements(DType t, const Visit& visit) {
  switch (t) {
    case DType::float16:
      return visit(Elements<DType::float16>());
    case DType::bfloat16:
      return visit(Elements<DType::bfloat16>());
    default:
      return visit(Elements<DType::float32>());
  }
}

TM_INLINE vf load_as_float_n(const void* p, DType t, int64_t i, int64_t n) {
  return visit_elements(t, [&](auto e) { return e.load_n(p, i, n); });
}
TM_INLINE void store_from_float_n(void* p, DType t, int64_t i, vf x, int64_t n) {
  visit_elements(t, [&](auto e) { e.store_n(p, i, x, n); });
}
TM_INLINE float scalar_as_float(const void* p, DType t, int64_t i) {
  return first(load_as_float_n(p, t, i, 1));
}

// Flushes denormals to zero during the lifetime of the object: decayed weights become denormal, and
// denormal arithmetic is slow.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(read_float_mode()) { write_float_mode(saved_ | kFlushBits); }
  ~FlushDenormals() { write_float_mode(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
};

}  // namespace tokenmill::TOKENMILL_ISA
