// Floating-point formats of PTX: conversions with every rounding mode, flushing and canonical NaNs.
// All results are defined by integer arithmetic or IEEE operations, never by the host's modes.
#pragma once
#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ptxvm {

enum class Rounding : uint8_t { nearest, zero, down, up, away };  // away: ties away from zero

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

constexpr uint32_t kNaN32 = 0x7fffffff;  // what the hardware returns for every NaN of f32
constexpr uint64_t kNaN64 = 0xfff8000000000000;
constexpr uint16_t kNaN16 = 0x7fff;  // f16 and bf16

// Layout of a format: fraction bits, smallest exponent of a normal number, infinity, NaN.
template <typename T>
struct Format;
template <>
struct Format<Half> {
  static constexpr int fraction = 10, least = -14;
  static constexpr uint32_t infinity = 0x7c00, sign = 0x8000, nan = kNaN16;
};
template <>
struct Format<BFloat> {
  static constexpr int fraction = 7, least = -126;
  static constexpr uint32_t infinity = 0x7f80, sign = 0x8000, nan = kNaN16;
};
template <>
struct Format<float> {
  static constexpr int fraction = 23, least = -126;
  static constexpr uint32_t infinity = 0x7f800000, sign = 0x80000000, nan = kNaN32;
};

template <>
struct Format<double> {
  static constexpr int fraction = 52, least = -1022;
  static constexpr uint64_t infinity = 0x7ff0000000000000, sign = 0x8000000000000000, nan = kNaN64;
};

// where ? one : other, by masks: lets loops vectorise that would not with branches.
template <typename U>
constexpr U choose(bool where, U one, U other) {
  const U mask = static_cast<U>(U{0} - static_cast<U>(where));
  return static_cast<U>((one & mask) | (other & ~mask));
}

inline float canonical(float x) { return x == x ? x : std::bit_cast<float>(kNaN32); }
inline double canonical(double x) { return x == x ? x : std::bit_cast<double>(kNaN64); }

// Flushes subnormal numbers to zeros of their sign.
inline float flush(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>(bits & choose<uint32_t>(bits & 0x7f800000, ~0u, 0x80000000));
}
inline Half flush(Half x) {
  return {static_cast<uint16_t>(x.bits & choose<uint16_t>(x.bits & 0x7c00, 0xffff, 0x8000))};
}
inline BFloat flush(BFloat x) {
  return {static_cast<uint16_t>(x.bits & choose<uint16_t>(x.bits & 0x7f80, 0xffff, 0x8000))};
}

inline bool is_nan(Half x) { return (x.bits & 0x7fff) > 0x7c00; }
inline bool is_nan(BFloat x) { return (x.bits & 0x7fff) > 0x7f80; }
inline bool is_nan(float x) { return x != x; }
inline bool is_nan(double x) { return x != x; }

// Exact. A subnormal half is an integer times 2^-24, so that no subnormal float occurs on the way.
[[gnu::always_inline]] inline float to_float(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t small =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t special = choose<uint32_t>(magnitude == 0x7c00, 0x7f800000, kNaN32);
  const uint32_t value =
      choose(magnitude < 0x400, small, choose(magnitude >= 0x7c00, special, normal));
  return std::bit_cast<float>(value | choose<uint32_t>(magnitude > 0x7c00, 0, sign));
}
inline float to_float(BFloat x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
inline float to_float(float x) { return x; }

inline double to_double(double x) { return x; }
template <typename T>
inline double to_double(T x) {
  return static_cast<double>(to_float(x));
}

// Round to nearest even. 0.5 + x has the granularity of subnormal halves.
[[gnu::always_inline]] inline Half half_from(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = ((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112u << 10);
  const uint32_t small =
      std::bit_cast<uint32_t>(0.5f + std::bit_cast<float>(magnitude)) - 0x3f000000u;
  uint32_t value = choose(magnitude < 0x38800000, small, normal);
  value = choose<uint32_t>(magnitude >= 0x477ff000, 0x7c00, value) | (bits >> 16 & 0x8000);
  return {static_cast<uint16_t>(choose<uint32_t>(magnitude > 0x7f800000, kNaN16, value))};
}
[[gnu::always_inline]] inline BFloat bfloat_from(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t value = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return {static_cast<uint16_t>(choose<uint32_t>(nan, kNaN16, value))};
}

template <typename T>
inline T nearest(float x);
template <>
inline Half nearest<Half>(float x) {
  return half_from(x);
}
template <>
inline BFloat nearest<BFloat>(float x) {
  return bfloat_from(x);
}
template <>
inline float nearest<float>(float x) {
  return x;
}

// Rounds a double to a narrower format in any rounding mode; returns bits.
template <typename T>
inline uint32_t narrow(double x, Rounding rounding) {
  using F = Format<T>;
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const bool negative = bits >> 63;
  const uint32_t sign = negative ? F::sign : 0;
  const int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023;
  const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
  if (exponent == 1024) return fraction ? F::nan : sign | F::infinity;
  if ((bits << 1) == 0) return sign;
  const uint64_t significand = fraction | (exponent == -1023 ? 0 : uint64_t{1} << 52);
  const int scale = exponent < F::least ? F::least - exponent : 0;
  const int shift = std::min(52 - F::fraction + scale, 62);
  const uint64_t kept = significand >> shift;
  const uint64_t rest = significand - (kept << shift), half = uint64_t{1} << (shift - 1);
  bool up = false;
  switch (rounding) {
    case Rounding::nearest:
      up = rest > half || (rest == half && (kept & 1));
      break;
    case Rounding::away:
      up = rest >= half;
      break;
    case Rounding::zero:
      break;
    case Rounding::down:
      up = negative && rest;
      break;
    case Rounding::up:
      up = !negative && rest;
      break;
  }
  // The hidden bit of a normal number adds one to the exponent field.
  const uint64_t base = scale ? 0 : static_cast<uint64_t>(exponent - F::least) << F::fraction;
  const uint64_t value = base + kept + up;
  if (value < F::infinity) return sign | static_cast<uint32_t>(value);
  const bool to_infinity = rounding == Rounding::nearest || rounding == Rounding::away ||
                           rounding == (negative ? Rounding::down : Rounding::up);
  return sign | (to_infinity ? F::infinity : F::infinity - 1);
}

template <typename T>
inline T from_bits(uint32_t bits) {
  return std::bit_cast<T>(static_cast<uint16_t>(bits));
}
template <>
inline float from_bits<float>(uint32_t bits) {
  return std::bit_cast<float>(bits);
}

// a * b + c rounded to odd, for a product that is exact in double: the last bit records what was
// lost, so that a second rounding to at most 51 bits equals a single one.
[[gnu::always_inline]] inline double odd_fma(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  const double shadow = sum - product;
  const double lost = (product - (sum - shadow)) + (c - shadow);
  const uint64_t bits = std::bit_cast<uint64_t>(sum), rest = std::bit_cast<uint64_t>(lost);
  const bool finite = (bits & Format<double>::infinity) != Format<double>::infinity;
  const bool adjust = ((rest << 1) != 0) & finite & !(bits & 1);
  const uint64_t inward = (rest ^ bits) >> 63;
  return std::bit_cast<double>(bits + choose<uint64_t>(adjust, 1 - 2 * inward, 0));
}

// An integer as a double, rounded to odd.
inline double odd_double(uint64_t x) {
  const int excess = 64 - 53 - std::countl_zero(x);
  if (excess <= 0) return static_cast<double>(x);
  const uint64_t low = (uint64_t{1} << excess) - 1;
  return static_cast<double>((x & ~low) | ((x & low) ? uint64_t{1} << excess : 0));
}
inline double odd_double(int64_t x) {
  return x < 0 ? -odd_double(uint64_t{0} - static_cast<uint64_t>(x))
               : odd_double(static_cast<uint64_t>(x));
}

// Directed rounding of f32 and f64 by the host's rounding mode. Operands are loaded and results
// stored between constructor and destructor, across which no compiler moves memory accesses.
class RoundingScope {
 public:
#if defined(__SSE2__) && defined(__FMA__)
  explicit RoundingScope(Rounding rounding) : old_(_mm_getcsr()) {
    static constexpr unsigned modes[] = {_MM_ROUND_NEAREST, _MM_ROUND_TOWARD_ZERO, _MM_ROUND_DOWN,
                                         _MM_ROUND_UP};
    _mm_setcsr((old_ & ~static_cast<unsigned>(_MM_ROUND_MASK)) | modes[static_cast<int>(rounding)]);
    asm volatile("" ::: "memory");
  }
  ~RoundingScope() {
    asm volatile("" ::: "memory");
    _mm_setcsr(old_);
  }
#else  // fma is a library function, which queries the mode of all units
  explicit RoundingScope(Rounding rounding) : old_(static_cast<unsigned>(std::fegetround())) {
    static constexpr int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    std::fesetround(modes[static_cast<int>(rounding)]);
  }
  ~RoundingScope() { std::fesetround(static_cast<int>(old_)); }
#endif
  RoundingScope(const RoundingScope&) = delete;
  RoundingScope& operator=(const RoundingScope&) = delete;

 private:
  unsigned old_;
};

}  // namespace ptxvm
