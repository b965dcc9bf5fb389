"""Parameters of tests and the tensors that they draw: one definition for every operator."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of, in_each_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

each_backend = pytest.mark.parametrize("backend", backends("reference"))
each_kernel = pytest.mark.parametrize("backend", backends())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_dtype_and_kernel = pytest.mark.parametrize(
    ("dtype", "backend"), in_each_dtype(DTYPES, [(b,) for b in backends()])
)


def randn(*shape, dtype=torch.float32, backend="cpu"):
    return torch.randn(shape).to(dtype).to(device_of(backend))


def ints(*values, backend="cpu"):
    """int32 ids, lengths or offsets."""
    return torch.tensor(values, dtype=torch.int32, device=device_of(backend))
