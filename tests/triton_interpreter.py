"""Triton's interpreter without the work that it repeats at every call of a device function and at
every operation: looking through the whole language for what to replace, which the launch has done,
building a table of types, and a dozen operations of the language beside each one of integers, to
see that it does not overflow. Four fifths of the time of a test went there.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    patch = interpreter._patch_lang
    launch, patched = None, set()

    def patch_lang(function):
        nonlocal launch
        names = function.__globals__.values()
        modules = tuple(m for m in (tl, tl.core) if any(value is m for value in names))
        if launch is None or not launch._changes:  # there was none, or it has been restored
            launch = patch(function)
            patched.clear()
            patched.add(modules)
            return launch
        if modules in patched:
            return interpreter._LangPatchScope()
        patched.add(modules)
        return patch(function)

    interpreter._patch_lang = patch_lang


def keep_numpy_types() -> None:
    numpy_type = interpreter._get_np_dtype
    known = {}

    def get_np_dtype(dtype):
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(scalar, tl.pointer_type):
            return numpy_type(scalar)
        if scalar.name not in known:
            known[scalar.name] = numpy_type(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = get_np_dtype


def check_overflow_at_once() -> None:
    """In one operation of NumPy on 64 bits."""
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(semantic, left, right, operation):
        scalar = left.type.scalar
        if scalar.int_bitwidth >= 64:
            return
        wide = (x.handle.data.astype(np.int64) for x in (left, right))
        exact = operations[operation.__name__](*wide)
        least, most = scalar.get_int_min_value(), scalar.get_int_max_value()
        if exact.size and (exact.min() < least or exact.max() > most):
            raise AssertionError(f"{scalar} overflow detected for operation {operation.__name__}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def hasten() -> None:
    """Other releases of Triton, which have other insides, stay as they are."""
    if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_patch_lang"):
        patch_once_a_launch()
    if hasattr(interpreter, "_get_np_dtype"):
        keep_numpy_types()
    if hasattr(TritonSemantic, "binary_op_sanitize_overflow_impl"):
        check_overflow_at_once()
