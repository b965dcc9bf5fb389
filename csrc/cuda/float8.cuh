// float8_e4m3fn by bit arithmetic, for any compute capability: sign, 4 exponent bits with bias 7, 3
// mantissa bits. There is no infinity; 0x7f and 0xff are NaN, 448 (0x7e) is the largest number.
#pragma once
#include <cstdint>
#include <cstring>

#include "cuda/math.cuh"
#include "cuda/vector.cuh"

namespace tokenmill::cuda {

// Rounded to nearest even, saturated at +-448; NaN becomes 0x7f.
__device__ __forceinline__ uint32_t float8_code(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  const uint32_t cut = min(magnitude, 0x43e00000u);  // 448
  // Subnormal, below 2^-6: the last bit of a sum with 2^14 is worth 2^-9.
  const uint32_t small = __float_as_uint(__fadd_rn(__uint_as_float(cut), 0x1p14f)) - 0x46800000u;
  const uint32_t normal = ((cut + 0x7ffffu + (cut >> 20 & 1)) >> 20) - ((127 - 7) << 3);
  const uint32_t code = (cut < 0x3c800000u ? small : normal) | (bits >> 24 & 0x80u);
  return magnitude > 0x7f800000u ? 0x7fu : code;
}

// Value of the code in the low byte, exact.
__device__ __forceinline__ float float8_value(uint32_t code) {
  const uint32_t magnitude = code & 0x7fu, sign = (code & 0x80u) << 24;
  // Codes below 8 are 0 and the subnormal numbers, multiples of 2^-9.
  const uint32_t small = __float_as_uint(static_cast<float>(magnitude) * 0x1p-9f);
  const uint32_t normal = (magnitude << 20) + ((127 - 7) << 23);
  const uint32_t bits = magnitude < 8 ? small : normal;
  return __uint_as_float((magnitude == 0x7f ? 0x7fc00000u : bits) | sign);
}

// Products of two pairs of 16-bit numbers.
template <typename T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, __half>) return mul_packed(a, b);
  uint32_t y;  // -0 keeps the sign of 0
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
  return y;
}

// Converts codes to 16 bytes of T, exactly.
//
// 16-bit T: exponent and mantissa bits are shifted to their place in T, and a product with a power
// of two that has the sign of the code corrects the bias. Byte permutations and half-precision
// multiplications leave the integer units to other work; NaN, which would become 480, is tested for
// on whole words.
template <typename T>
__device__ __forceinline__ void convert_float8(uint32_t (&to)[4],
                                               const uint32_t (&codes)[4 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = __float_as_uint(float8_value(codes[0] >> 8 * i));
  } else {
    constexpr bool kHalf = std::is_same_v<T, __half>;
    constexpr int kShift = kHalf ? 7 : 4;
    // 2^8 and 2^120 by their bytes, 0x5c00 and 0x7b80.
    constexpr uint32_t kHigh = kHalf ? 0x5c5c5c5cu : 0x7b7b7b7bu, kLow = kHalf ? 0 : 0x80;
    uint32_t nan = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = codes[i / 2], magnitudes = code & 0x7f7f7f7fu;
      const uint32_t powers = (code & 0x80808080u) | kHigh;
      const uint32_t low = i % 2 ? 0x4342 : 0x4140;   // a byte, then 0
      const uint32_t high = i % 2 ? 0x3424 : 0x1404;  // kLow, then a byte
      const uint32_t magnitude = __byte_perm(magnitudes, 0, low) << kShift;
      to[i] = multiply_pair<T>(magnitude, __byte_perm(powers, kLow, high));
      nan |= magnitudes + 0x01010101u;
    }
    if (!(nan & 0x80808080u)) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = __byte_perm(codes[i / 2], 0, i % 2 ? 0x4342 : 0x4140);
      to[i] |= (((code & 0x7f007fu) + 0x10001u) >> 7 & 0x10001u) * 0x7fffu;
    }
  }
}

// Element type of a tensor.
struct Float8 {
  Float8() = default;
  __device__ __forceinline__ explicit Float8(float x) : code(float8_code(x)) {}
  __device__ __forceinline__ explicit operator float() const { return float8_value(code); }
  uint8_t code;
};

// Stores codes, four to a word.
template <int kCount>
__device__ __forceinline__ void store_floats(Float8* to, const float (&from)[kCount]) {
  if constexpr (kCount % 4 != 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = Float8(from[i]);
  } else {
    Pack<uint32_t, kCount / 4> words;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i)
      words.x[i] = float8_code(from[4 * i]) | float8_code(from[4 * i + 1]) << 8 |
                   float8_code(from[4 * i + 2]) << 16 | float8_code(from[4 * i + 3]) << 24;
    *reinterpret_cast<Pack<uint32_t, kCount / 4>*>(to) = words;
  }
}

}  // namespace tokenmill::cuda
