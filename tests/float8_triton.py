"""Programs of triton_kernels/float8.py for tests/test_float8.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenmill.triton_kernels.float8 import float8_codes, float8_values


@triton.jit
def codes_kernel(x, to, length, BLOCK: tl.constexpr):
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + o_i, float8_codes(tl.load(x + o_i, mask=o_i < length)), mask=o_i < length)


@triton.jit
def values_kernel(x, to, length, BLOCK: tl.constexpr):
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + o_i, float8_values(tl.load(x + o_i, mask=o_i < length)), mask=o_i < length)


def _convert(kernel, x, dtype):
    to = torch.empty(x.shape, dtype=dtype, device=x.device)
    kernel[(triton.cdiv(x.numel(), 8192),)](x, to, x.numel(), BLOCK=8192)
    return to


def convert_codes(x):
    return _convert(codes_kernel, x, torch.uint8)


def convert_values(x):
    return _convert(values_kernel, x, torch.float32)
