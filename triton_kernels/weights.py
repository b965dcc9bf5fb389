"""Score maps of every kind: weights f(z), their derivatives and row factors."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INF, INTERPRETED, LOG2E, dot

# Sigmoid weights near 1 / n are subnormal in float16 for n >= 16384.
FLOAT16_SCALE = tl.constexpr(2.0**15)
# Added to the row sum before division.
MIN_SUM = tl.constexpr(1e-8)


@triton.jit
def exponential(b_z, head):
    return tl.exp2(b_z * head.log2e)


@triton.jit
def sigmoid(b_z, head, FAST: tl.constexpr):
    """P = 1 / (1 + e^-z) and 1 - P, both without cancellation unless FAST."""
    if FAST and not INTERPRETED:
        b_half = b_z * (0.5 * head.log2e / LOG2E)
        b_tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [b_half], tl.float32, is_pure=True, pack=1
        )
        b_p = 0.5 + 0.5 * b_tanh
        b_rest = 0.5 - 0.5 * b_tanh
    else:
        b_odds = exponential(-b_z, head)
        b_p = 1.0 / (1.0 + b_odds)
        b_rest = tl.where(b_odds > 1e37, 1.0, b_odds * b_p)
    return b_p, b_rest


@triton.jit
def weights(b_z, head, KIND: tl.constexpr, FAST: tl.constexpr):
    """f(z) of kinds other than softmax, and its derivative. Both are 0 if z is -inf, and NaN if z
    is NaN."""
    if KIND == "sigmoid":
        b_f, b_rest = sigmoid(b_z, head, FAST)
        b_slope = b_f * b_rest
    elif KIND == "relu":
        b_f = tl.where(b_z < 0.0, 0.0, b_z)
        b_slope = tl.where(b_z < 0.0, 0.0, 1.0)
    elif KIND == "elu1":
        b_e = exponential(tl.where(b_z > 0.0, 0.0, b_z), head)
        b_f = tl.where(b_z > 0.0, b_z + 1.0, b_e)
        b_slope = tl.where(b_z > 0.0, 1.0, b_e)
    elif KIND == "linear":
        b_f = tl.where(b_z == -INF, 0.0, b_z)
        b_slope = tl.where(b_z == -INF, 0.0, 1.0)
    else:  # taylor2
        m_hidden = b_z == -INF
        b_slope = 1.0 + tl.where(m_hidden, -1.0, b_z)
        b_f = tl.where(m_hidden, 0.0, 0.5 + 0.5 * b_slope * b_slope)
    return b_f, b_slope


@triton.jit
def inverse(b_sum, KIND: tl.constexpr, NORMALIZE: tl.constexpr):
    """Row factor of weights, from their row sum or count."""
    if NORMALIZE == "count":
        b_inverse = 1.0 / tl.maximum(b_sum, 1.0)
    elif KIND == "linear":  # weights of either sign
        b_inverse = 1.0 / tl.maximum(tl.abs(b_sum), 1.0)
    else:
        b_inverse = 1.0 / (b_sum + MIN_SUM)
    return b_inverse


@triton.jit
def weighted(b_w, b_x, KIND: tl.constexpr):
    """Product of weights or their gradients with rows. Unbounded kinds may exceed the float16
    range: a power of two per row is factored out of the product."""
    if KIND != "softmax" and KIND != "sigmoid" and b_x.dtype == tl.float16:
        b_bits = tl.max(tl.abs(b_w), 1).to(tl.uint32, bitcast=True) & 0x7F800000
        m_normal = (b_bits > 0) & (b_bits < 0x7F800000)
        b_unit = tl.where(m_normal, b_bits.to(tl.float32, bitcast=True), 1.0)
        b_product = dot(b_w * (1.0 / b_unit)[:, None], b_x) * b_unit[:, None]
    else:
        b_product = dot(b_w, b_x)
    return b_product
