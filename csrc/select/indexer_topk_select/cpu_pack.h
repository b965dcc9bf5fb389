// Transposed panels of keys as floats: 8-bit and 16-bit elements are transposed as 32-bit words.
#pragma once
#include <algorithm>

#include "cpu/float8.h"
#include "cpu/tile.h"

namespace tokenmill::TOKENMILL_ISA {

// pack_transposed of bfloat16 to float32: pairs of elements are transposed as words, which takes
// half of the shuffles, and split afterwards.
template <class Source>
inline void pack_pairs(const Source from, int64_t rows, int64_t length, float* dst) {
  using Bits = uint32_t __attribute__((vector_size(sizeof(vf))));
  const PairWords pairs;
  const int64_t words = ceil_div(length, 2);
  for (int64_t c = 0; c < kPanel; c += kWidth)
    for (int64_t w = 0; w < words; w += kWidth) {
      vf block[kWidth];
      TM_UNROLL(16)
      for (int i = 0; i < kWidth; ++i)
        block[i] = c + i < rows ? pairs(from.template at<uint16_t>(c + i), 2 * w, length) : zero();
      transpose(block);
      float* const to = dst + 2 * w * kPanel + c;
      const int64_t there = std::min<int64_t>(length - 2 * w, 2 * kWidth);
      TM_UNROLL(16)
      for (int i = 0; i < kWidth; ++i) {
        const Bits bits = std::bit_cast<Bits>(block[i]);
        if (2 * i < there) store(to + 2 * i * kPanel, std::bit_cast<vf>(bits << 16));
        if (2 * i + 1 < there)
          store(to + (2 * i + 1) * kPanel, std::bit_cast<vf>(bits & 0xffff0000u));
      }
    }
}

// 4 kWidth codes from index d on, 0 past `length`.
TM_INLINE vf load_codes(const uint8_t* p, int64_t d, int64_t length) {
  if (d + 4 * kWidth <= length) return load(reinterpret_cast<const float*>(p + d));
  uint8_t lane[4 * kWidth] = {};
  for (int64_t l = d; l < length; ++l) lane[l - d] = p[l];
  return load(reinterpret_cast<const float*>(lane));
}

// Value of the byte of each word that a shift by kShift makes the highest; NaN codes become +-480.
template <int kShift>
TM_INLINE vf float8_byte(float8_words codes) {
  const float8_words code = codes << kShift, magnitude = (code & 0x7f000000) >> 4;
  const vf normal = std::bit_cast<vf>(magnitude + ((127 - 7) << 23));
  // For 0 and the subnormal numbers `normal` is 2^-7 (1 + m / 8), which must become 2^-6 m / 8; for
  // the others the second operand is larger.
  const vf value = min_of(normal, fma(normal, set(2.f), set(-0x1p-6f)));
  return std::bit_cast<vf>(std::bit_cast<float8_words>(value) | (code & ~0x7fffffff));
}

// pack_transposed of float8_e4m3fn codes, each row times its scale: words of four codes are
// transposed, then converted to floats. With pairs, the words hold codes times powers of two,
// exactly, and the remaining factors of the scales, 1 to 2, stay in `scales`. A row with a NaN has
// a NaN in its first word.
template <class Op, class Source>
inline void pack_codes(const Source from, int64_t rows, int64_t length, float* scales, float* dst) {
  const int64_t words = words_of<Op>(length);
  for (int64_t c = 0; c < kPanel; c += kWidth) {
    vf scale = load(scales + c);
    if constexpr (Op::kPair == 2) {
      const auto bits = std::bit_cast<float8_words>(scale);
      store(scales + c, std::bit_cast<vf>((bits & 0x7fffff) | 0x3f800000));
      scale = std::bit_cast<vf>(scale == scale ? bits & ~0x7fffff : bits);
    }
    float8_words found{};  // high bit of a byte: NaN
    for (int64_t d = 0; d < length; d += 4 * kWidth) {
      vf block[kWidth];
      TM_UNROLL(16)
      for (int i = 0; i < kWidth; ++i)
        block[i] = c + i < rows ? load_codes(from.template at<uint8_t>(c + i), d, length) : zero();
      transpose(block);
      float* const to = dst + d / Op::kPair * kPanel + c;
      const int64_t there = words - d / Op::kPair;
      TM_UNROLL(16)
      for (int i = 0; i < kWidth; ++i) {
        const auto codes = std::bit_cast<float8_words>(block[i]);
        found |= (codes & 0x7f7f7f7f) + 0x01010101;
        const vf x[4] = {float8_byte<24>(codes) * scale, float8_byte<16>(codes) * scale,
                         float8_byte<8>(codes) * scale, float8_byte<0>(codes) * scale};
        if constexpr (Op::kPair == 1) {
          TM_UNROLL(4)
          for (int j = 0; j < 4; ++j)
            if (4 * i + j < there) store(to + (4 * i + j) * kPanel, x[j]);
        }
#if defined(__AVX512BF16__)
        if constexpr (Op::kPair == 2) {
          if (2 * i < there) store(to + 2 * i * kPanel, pair_bfloat(x[0], x[1]));
          if (2 * i + 1 < there) store(to + (2 * i + 1) * kPanel, pair_bfloat(x[2], x[3]));
        }
#endif
      }
    }
    const float8_words nan = (found & ~0x7f7f7f7f) != 0 ? float8_words{} + 0x7fc00000 : 0;
    store(dst + c, std::bit_cast<vf>(std::bit_cast<float8_words>(load(dst + c)) | nan));
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
