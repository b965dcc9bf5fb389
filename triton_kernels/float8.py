"""float8_e4m3fn by bit arithmetic, for chips without it: sign, 4 exponent bits with bias 7, 3
mantissa bits. No infinity; 0x7f and 0xff are NaN, 448 (0x7e) is the maximum. Kernels see such
tensors as uint8."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float8_codes(b_x):
    """float32 rounded to nearest even, saturated at +-448; NaN becomes 0x7f."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_magnitude = b_bits & 0x7FFFFFFF
    b_cut = tl.minimum(b_magnitude, 0x43E00000)  # 448
    # Magnitudes below 2^-6: adding 2^14 rounds to a last bit worth 2^-9.
    b_sum = b_cut.to(tl.float32, bitcast=True) + 16384.0
    b_small = b_sum.to(tl.int32, bitcast=True) - 0x46800000
    b_normal = ((b_cut + 0x7FFFF + ((b_cut >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    b_code = tl.where(b_cut < 0x3C800000, b_small, b_normal) | ((b_bits >> 24) & 0x80)
    return tl.where(b_magnitude > 0x7F800000, 0x7F, b_code).to(tl.uint8)


@triton.jit
def float8_values(b_code):
    """Exact float32 value of each code."""
    b_magnitude = b_code.to(tl.int32) & 0x7F
    b_sign = (b_code.to(tl.int32) & 0x80) << 24
    # Magnitudes below 8 are zero and subnormals, multiples of 2^-9.
    b_small = (b_magnitude.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    b_normal = (b_magnitude << 20) + ((127 - 7) << 23)
    b_bits = tl.where(b_magnitude < 8, b_small, b_normal)
    b_bits = tl.where(b_magnitude == 0x7F, 0x7FC00000, b_bits)
    return (b_bits | b_sign).to(tl.float32, bitcast=True)
