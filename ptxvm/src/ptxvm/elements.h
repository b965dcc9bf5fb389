// Elements of matrices, packed into registers of 32 bits: `per` elements each. get: element j.
#pragma once
#include <bit>
#include <cmath>

#include "ptxvm/floats.h"
#include "ptxvm/tensor.h"

namespace ptxvm {

// least: exponent of the smallest normal number.
struct F16 {
  static constexpr Operand type = Operand::f16;
  static constexpr int per = 2, least = -14;
  static float get(uint32_t bits, int j) {
    return to_float(Half{static_cast<uint16_t>(bits >> (16 * j))});
  }
};
struct BF16 {
  static constexpr Operand type = Operand::bf16;
  static constexpr int per = 2, least = -126;
  static float get(uint32_t bits, int j) {
    return to_float(BFloat{static_cast<uint16_t>(bits >> (16 * j))});
  }
};
// The hardware ignores the low 13 bits.
struct TF32 {
  static constexpr Operand type = Operand::tf32;
  static constexpr int per = 1, least = -126;
  static float get(uint32_t bits, int) { return std::bit_cast<float>(bits & 0xffffe000); }
};
// e4m3 has no infinity and one NaN of each sign; e5m2 is the upper half of f16.
struct E4M3 {
  static constexpr Operand type = Operand::f8;
  static constexpr int per = 4, least = -6;
  static float get(uint32_t bits, int j) {
    const uint32_t x = bits >> (8 * j) & 0xff, exponent = x >> 3 & 15, fraction = x & 7;
    if (exponent == 15 && fraction == 7) return std::bit_cast<float>(kNaN32);
    const float size =
        exponent ? std::ldexp(static_cast<float>(8 + fraction), static_cast<int>(exponent) - 10)
                 : std::ldexp(static_cast<float>(fraction), -9);
    return x >> 7 ? -size : size;
  }
};
struct E5M2 {
  static constexpr Operand type = Operand::f8;
  static constexpr int per = 4, least = -14;
  static float get(uint32_t bits, int j) {
    return to_float(Half{static_cast<uint16_t>((bits >> (8 * j) & 0xff) << 8)});
  }
};
template <typename T>
struct Int8 {
  static constexpr int per = 4;
  static int32_t get(uint32_t bits, int j) {
    return static_cast<T>(static_cast<uint8_t>(bits >> (8 * j)));
  }
};

}  // namespace ptxvm
