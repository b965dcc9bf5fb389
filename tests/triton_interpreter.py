"""Triton's interpreter without the work that it repeats at every call of a device function and at
every operation: searching the whole language for functions to replace, which the launch has done,
building tables of types, block types and shapes that it has built before, and a dozen operations of
the language for each integer operation, to check for overflow. This took nine tenths of the time of
a test. The operations are in triton_operations.py.
"""

from __future__ import annotations

import inspect

import numpy as np
import triton.language as tl
import triton_operations
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    patch = interpreter._patch_lang
    launch, patched = None, set()
    modules_of = {}  # file -> modules of the language that its functions name

    def patch_lang(function):
        nonlocal launch
        file = function.__module__
        if file not in modules_of:
            names = function.__globals__.values()
            modules_of[file] = tuple(m for m in (tl, tl.core) if any(v is m for v in names))
        modules = modules_of[file]
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


def call_builtins_at_once() -> None:
    """Calls builtins without a copy of their keywords and without the interpreter's argument
    check."""

    def patch_attr(module, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(module, name, call)

    interpreter._patch_attr = patch_attr


def look_once_at_plain_values() -> None:
    unwrap, equal = tl.core._unwrap_if_constexpr, tl.dtype.__eq__
    plain = frozenset([int, float, bool, type(None), tl.tensor, tl.dtype, tl.block_type])

    def unwrap_if_constexpr(value):
        kind = type(value)
        if kind is tl.constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    tl.core._unwrap_if_constexpr = unwrap_if_constexpr
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


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


def keep_block_types() -> None:
    """One object per pair of element type and shape, which caches the properties that its tensors
    need."""
    make_type = tl.block_type.__init__
    known = {}
    scalar = tl.tuple([]), tl.constexpr(1)

    def new_type(cls, element_ty=None, shape=()):
        sizes = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
        key = id(element_ty), sizes  # a type holds its element_ty, so that the id stays unique
        if key not in known:
            made = object.__new__(cls)
            make_type(made, element_ty, shape)
            made.sizes = sizes
            made.of_tensor = tl.tuple([tl.constexpr(s) for s in sizes]), tl.constexpr(made.numel)
            known[key] = made
        return known[key]

    def init_tensor(self, handle, type):
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        self.shape, self.numel = type.of_tensor if type.is_block() else scalar

    tl.block_type.__new__ = new_type
    tl.block_type.__init__ = lambda self, element_ty=None, shape=(): None
    tl.tensor.__init__ = init_tensor


def keep_types_of_arguments() -> None:
    """One object per type of a kernel's arguments."""
    make_type, known = tl.str_to_ty, {}

    def str_to_ty(name, c):
        if not isinstance(name, str) or c is not None:
            return make_type(name, c)
        if name not in known:
            known[name] = make_type(name, c)
        return known[name]

    tl.str_to_ty = str_to_ty


def check_sizes_at_once() -> None:
    def post_init(self):
        dtype = self.dtype
        if type(dtype) is tl.dtype and self.data.itemsize * 8 > max(8, dtype.primitive_bitwidth):
            raise ValueError(f"elements of {self.data.itemsize} bytes are none of {dtype}")

    interpreter.TensorHandle.__post_init__ = post_init


def check_overflow_at_once() -> None:
    """Checks in one NumPy operation on 64 bits."""
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(semantic, left, right, operation):
        scalar = left.type.scalar
        if scalar.int_bitwidth >= 64:
            return
        wide = (x.handle.data.astype(np.int64) for x in (left, right))
        exact = operations[operation.__name__](*wide)
        minimum, maximum = scalar.get_int_min_value(), scalar.get_int_max_value()
        if exact.size and (exact.min() < minimum or exact.max() > maximum):
            raise AssertionError(f"{scalar} overflow detected for operation {operation.__name__}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def hasten() -> None:
    """Applies the patches; Triton releases with other internals are left unchanged."""
    if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_patch_lang"):
        patch_once_a_launch()
    if hasattr(interpreter, "_patch_attr") and hasattr(interpreter, "interpreter_semantic"):
        call_builtins_at_once()
    if hasattr(tl.core, "_unwrap_if_constexpr"):
        look_once_at_plain_values()
    if hasattr(interpreter, "_get_np_dtype"):
        keep_numpy_types()
    if list(inspect.signature(tl.block_type).parameters) == ["element_ty", "shape"]:
        keep_block_types()
        keep_types_of_arguments()
        check_sizes_at_once()
        triton_operations.hasten()
    if hasattr(TritonSemantic, "binary_op_sanitize_overflow_impl"):
        check_overflow_at_once()
