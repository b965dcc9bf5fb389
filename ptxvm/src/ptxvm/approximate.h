// Elementary functions in double precision, built only from IEEE operations in a fixed order: the
// same bits with any compiler, library and instruction set. The relative error is below 2^-34, so
// that rounding to f32 is correct for all but few operands.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ptxvm {

constexpr double kLog2E = 0x1.71547652b82fep0, kTwoOverPi = 0x1.45f306dc9c883p-1,
                 kHalfPi = 0x1.921fb54442d18p0;

// The low bits of x + kRounder are x rounded to an integer.
constexpr double kRounder = 0x1.8p52;

// sum of coefficients[i] * x^i.
template <int N>
double polynomial(const double (&coefficients)[N], double x) {
  double sum = coefficients[N - 1];
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// 2^x = 2^n 2^f, |f| <= 1/2: Taylor series, ln(2)^i / i!.
inline double exp2_of(double x) {
  constexpr double terms[] = {1.0,
                              0.693147180559945309,
                              0.240226506959100712,
                              0.0555041086648215800,
                              0.00961812910762847717,
                              0.00133335581464284434,
                              0.000154035303933816100,
                              0.0000152527338040598402,
                              0.00000132154867901443094,
                              0.000000101780860092396998};
  x = x < -200 ? -200 : x > 200 ? 200 : x;
  const double shifted = x + kRounder, fraction = x - (shifted - kRounder);
  const double scale = std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) + 1023) << 52);
  return polynomial(terms, fraction) * scale;
}

// log2(2^e m) = e + 2 / ln(2) atanh((m - 1) / (m + 1)), m between sqrt(1/2) and sqrt(2).
inline double log2_of(double x) {
  constexpr double scale = 2 * kLog2E;
  constexpr double terms[] = {scale,     scale / 3,  scale / 5,  scale / 7,
                              scale / 9, scale / 11, scale / 13, scale / 15};
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  double m = std::bit_cast<double>((bits & 0x000fffffffffffff) | 0x3ff0000000000000);
  const bool large = m > 1.4142135623730951;
  m = large ? m * 0.5 : m;
  const int32_t exponent = static_cast<int32_t>(bits >> 52 & 0x7ff) - 1023 + large;
  const double s = (m - 1) / (m + 1);
  const double value = exponent + s * polynomial(terms, s * s);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const double special = x == 0 ? -infinity : x > 0 ? infinity : nan;
  return x > 0 && x < infinity ? value : special;
}

// sin(x + quarter turns): the angle in quarters is reduced by whole turns, then to |r| <= pi / 4.
inline double sine_of(double x, int quarters) {
  constexpr double odd[] = {1.0,          -1.0 / 6,        1.0 / 120,         -1.0 / 5040,
                            1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800.0};
  constexpr double even[] = {1.0,         -1.0 / 2,       1.0 / 24,        -1.0 / 720,
                             1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200.0};
  const double angle = std::abs(x) * kTwoOverPi;
  const double turned = angle - 4 * std::floor(angle * 0.25);
  const double shifted = turned + kRounder, r = (turned - (shifted - kRounder)) * kHalfPi;
  const uint64_t quadrant = std::bit_cast<uint64_t>(shifted) + static_cast<uint64_t>(quarters);
  const double value = quadrant & 1 ? polynomial(even, r * r) : r * polynomial(odd, r * r);
  const bool negative = (quadrant & 2) != 0;
  const bool flip = quarters == 0 && std::signbit(x);
  return negative != flip ? -value : value;
}

// tanh(|x|) = (1 - e) / (1 + e) with e = exp(-2 |x|), or three terms of the series where that would
// cancel.
inline double tanh_of(double x) {
  const double a = std::abs(x), e = exp2_of(a * (-2 * kLog2E));
  const double small = a * (1 - a * a * (1.0 / 3 - a * a * (2.0 / 15)));
  return std::copysign(a < 0.02 ? small : (1 - e) / (1 + e), x);
}

}  // namespace ptxvm
