"""The checks and operations of Triton's interpreter that tests/triton_interpreter.py replaces."""

from __future__ import annotations

import importlib.metadata
import itertools

import numpy as np
import pytest
import torch
from conftest import DEVICE

import tokenmill as tm
from tokenmill._call import library

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def kernel(x, out):
    b_x = tl.load(x + tl.arange(0, 4))
    tl.store(out + tl.arange(0, 4), b_x * 2 + 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU counts on beyond the last integer")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_an_overflow_of_32_bits_is_an_error(dtype):
    maximum = 2**30 - 1
    x = torch.tensor([0, -maximum, 5, maximum], dtype=dtype)
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


OPERATIONS = (
    "add", "sub", "mul", "truediv", "and_", "or_", "xor_", "less_than", "less_equal",
    "greater_than", "greater_equal", "equal", "not_equal", "shl", "lshr", "ashr", "mod", "floordiv",
    "where",
)  # fmt: skip
SHAPES = [((), ()), ((), (4,)), ((4, 1), (1, 2)), ((2, 4), (4,)), ((4,), (2,))]
NUMBERS = [0, 1, -1, 200, 2**31, 2**40, 2**64, 0.0, -0.0, 2.5, 1e300, float("nan"), True]


def operands():
    """Pairs of tensors of any two types, and tensors with numbers."""
    dtypes = ("int1", "uint8", "int32", "uint32", "int64", "fp16", "bf16", "fp32", "fp64")
    types = {getattr(tl, n.replace("fp", "float").replace("bf", "bfloat")): n for n in dtypes}
    random = np.random.default_rng(0)

    def draw(scalar, shape):
        dtype = triton.runtime.interpreter._get_np_dtype(scalar)
        data = (random.integers(0, 3, shape or (1,)) - (dtype.kind in "if")).astype(dtype)
        handle = triton.runtime.interpreter.TensorHandle(data, scalar)
        return tl.tensor(handle, tl.block_type(scalar, list(shape)) if shape else scalar)

    for left, right in itertools.product(types, repeat=2):
        for shapes in SHAPES:
            yield draw(left, shapes[0]), draw(right, shapes[1])
    for scalar, number in itertools.product(types, NUMBERS):
        yield draw(scalar, (4,)), number
        yield number, draw(scalar, ())
    pointers = draw(tl.pointer_type(tl.float32), (4,))
    for offset in (draw(tl.int32, (2, 4)), draw(tl.int64, ()), draw(tl.uint8, (4,)), 3, -2, 2.5):
        yield pointers, offset
        yield offset, pointers


def outcome(operation, left, right):
    """Bits and type of the result, or the error."""
    semantic = triton.runtime.interpreter.interpreter_semantic
    function = getattr(semantic, operation)
    more = (True,) if operation in ("add", "sub", "mul") else ()
    if operation == "where":
        function, more = semantic.where, (right,)
        left, right = semantic.to_tensor(True), left
    try:
        found = function(left, right, *more)
    except Exception as error:
        return type(error).__name__
    data = found.handle.data
    return str(found.type), str(data.dtype), data.shape, data.tobytes()


@pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_operations_are_those_of_triton(operation, monkeypatch):
    import triton_operations

    pairs = list(operands())
    patched = triton.runtime.interpreter._patch_lang(kernel.fn)
    try:
        found = [outcome(operation, *pair) for pair in pairs]
        for name, original in triton_operations.ORIGINAL.items():
            monkeypatch.setattr(triton.language.semantic.TritonSemantic, name, original)
        want = [outcome(operation, *pair) for pair in pairs]
    finally:
        patched.restore()
    for pair, one, other in zip(pairs, found, want, strict=True):
        assert one == other, pair
    assert sum(isinstance(one, tuple) for one in found) > 20


@pytest.mark.parametrize(
    "versions, reason",
    [
        ({"triton": "3.6.0", "numpy": "2.4.6"}, "needs Triton 3.7 or later, or NumPy below 2.4"),
        ({"triton": "3.6.0+git1", "numpy": "2.3.5"}, None),
        ({"triton": "3.7.0", "numpy": "2.4.0rc1"}, None),
        ({"triton": "3.7.0"}, "needs NumPy"),
    ],
    ids=str,
)
def test_an_interpreter_that_cannot_run_says_what_it_needs(versions, reason, monkeypatch):
    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fault = library._find_interpreter_fault()
    assert fault == (reason and f"Triton's interpreter {reason}")
    monkeypatch.setattr(library, "_INTERPRETER_FAULT", fault)
    rows = torch.zeros(1, 8)
    states = tm.backends()["triton"], tm.explain("topk_select", rows, 2)
    for said in map(str, states):
        assert not fault or fault in said
