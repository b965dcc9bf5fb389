"""The checks of Triton's interpreter that tests/triton_interpreter.py replaces."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def kernel(x, out):
    b_x = tl.load(x + tl.arange(0, 4))
    tl.store(out + tl.arange(0, 4), b_x * 2 + 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU counts on beyond the last integer")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_an_overflow_of_32_bits_is_an_error(dtype):
    most = 2**30 - 1
    x = torch.tensor([0, -most, 5, most], dtype=dtype)
    out = torch.empty_like(x)
    kernel[(1,)](x, out)
    assert torch.equal(out, 2 * x + 1)
    for value in (2**30, -(2**30) - 1):
        x[2] = value
        if dtype == torch.int64:
            kernel[(1,)](x, out)
            assert out[2] == 2 * value + 1
        else:
            with pytest.raises(Exception, match="int32 overflow detected for operation mul"):
                kernel[(1,)](x, out)
