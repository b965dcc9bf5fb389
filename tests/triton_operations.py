"""Elementwise operations of Triton's interpreter, each one call of NumPy.

The common type of the operands and the shape of the result depend only on the operands' types: they
are computed once for each pair of types, and cached as a plan. NumPy broadcasts by the same rule as
Triton: a missing dimension is a leading one. Without a plan (types that NumPy lacks, operands that
do not match, bits that wrap around) Triton's own code runs, and raises its own errors.
"""

from __future__ import annotations

import functools

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

FLOATS = (tl.float16, tl.float32, tl.float64)
INTS = (tl.int8, tl.int16, tl.int32, tl.int64, tl.uint8, tl.uint16, tl.uint32, tl.uint64)
NUMPY = {x: interpreter._get_np_dtype(x) for x in (*FLOATS, *INTS, tl.int1)}
MIN, MAX = -(2**63), 2**63 - 1  # range of numbers that get an element type

# Replaced functions; a Triton release that lacks one keeps its other functions too.
REPLACED = (
    "add", "sub", "mul", "truediv", "and_", "or_", "xor_", "less_than", "less_equal",
    "greater_than", "greater_equal", "equal", "not_equal", "shl", "lshr", "ashr", "cast", "where",
    "broadcast_impl_value", "binary_op_type_checking_impl", "expand_dims", "to_tensor",
)  # fmt: skip
ORIGINAL = {n: getattr(TritonSemantic, n) for n in REPLACED if hasattr(TritonSemantic, n)}

tensor = tl.tensor


def make(data, scalar, kind):
    """A tensor of type `kind` with element type `scalar`."""
    handle = object.__new__(TensorHandle)
    handle.data, handle.dtype, handle.attr = data, scalar, {}
    made = object.__new__(tensor)
    try:
        made.__dict__.update(kind.said)
    except AttributeError:  # the first of its type
        tensor.__init__(made, None, kind)
        kind.said = dict(made.__dict__)
    made.handle = handle
    return made


def kept(plan):
    """plan(left type, right type), computed once: a plan holds the types, so that their ids stay
    unique."""
    plans = {}

    def find(left, right):
        key = id(left), id(right)
        found = plans.get(key)
        if found is None:
            found = plans[key] = (plan(left, right), left, right)
        return found[0]

    return find


def shape_of(kind):
    return kind.sizes if kind.is_block() else ()


def block(scalar, shape):
    return tl.block_type(scalar, list(shape)) if shape else scalar


def common_shape(*kinds):
    """Broadcast shape, None if Triton refuses to broadcast."""
    try:
        return np.broadcast_shapes(*map(shape_of, kinds))
    except ValueError:
        return None


def common_scalar(left, right, divides=False):
    """The type that scalars of two types are cast to; None to leave it to Triton."""
    if left.is_ptr() or right.is_ptr() or left not in NUMPY or right not in NUMPY:
        return None
    semantic = interpreter.interpreter_semantic
    try:
        found = semantic.computation_type_impl(left, False, right, False, divides)
    except TypeError:
        return None
    return found if found in NUMPY else None


def number(value, scalar):
    """A number takes the type of the tensor it is combined with, if that type can hold it."""
    if type(value) is float:
        return NUMPY[scalar].type(value) if scalar in FLOATS else None
    if type(value) is not int or not MIN <= value <= MAX:
        return None
    if scalar in FLOATS:
        return NUMPY[scalar].type(value)
    if scalar not in INTS or not scalar.get_int_min_value() <= value <= scalar.get_int_max_value():
        return None
    return NUMPY[scalar].type(value)


class Operation:
    """An operation of TritonSemantic on two operands, one of which may be a number."""

    def __init__(self, name, ufunc, of, *, compares=False, divides=False, bounded=False):
        self.name, self.ufunc, self.of = name, ufunc, of
        self.compares, self.divides, self.bounded = compares, divides, bounded
        self.slow = ORIGINAL.get(name)
        self.plan_of = kept(self.plan)

    def plan(self, left, right):
        scalar = common_scalar(left.scalar, right.scalar, self.divides)
        shape = common_shape(left, right)
        if scalar not in self.of or shape is None:
            return None
        casts = [None if x.scalar == scalar else NUMPY[scalar] for x in (left, right)]
        return (
            *casts,
            scalar,
            block(tl.int1 if self.compares else scalar, shape),
            self.range(scalar),
        )

    def range(self, scalar):
        """Minimum and maximum result, if the interpreter checks the range."""
        if not self.bounded or scalar not in INTS or scalar.int_bitwidth == 64:
            return None
        return scalar.get_int_min_value(), scalar.get_int_max_value()

    @functools.cached_property
    def function(self):
        ufunc, plan_of, slow, bounded = self.ufunc, self.plan_of, self.slow, self.bounded
        wide = np.int64

        def refer(self, left, right, sanitize_overflow):
            rest = (sanitize_overflow,) if bounded else ()
            return slow(self, left, right, *rest)

        def operate(self, left, right, sanitize_overflow=False):
            if type(left) is tensor:
                x = left.handle.data
                if type(right) is tensor:
                    y, plan = right.handle.data, plan_of(left.type, right.type)
                else:
                    plan = plan_of(left.type, left.type)
                    y = plan and number(right, plan[2])
            elif type(right) is tensor:
                plan, y = plan_of(right.type, right.type), right.handle.data
                x = plan and number(left, plan[2])
            else:
                plan = None
            if plan is None or x is None or y is None:
                return refer(self, left, right, sanitize_overflow)
            cast_x, cast_y, scalar, kind, bounds = plan
            if cast_x is not None:
                x = x.astype(cast_x)
            if cast_y is not None:
                y = y.astype(cast_y)
            if bounds is None or not sanitize_overflow:
                return make(ufunc(x, y), scalar, kind)
            exact = ufunc(x, y, dtype=wide)
            if exact.size and not (bounds[0] <= exact.min() and exact.max() <= bounds[1]):
                return refer(self, left, right, sanitize_overflow)
            return make(exact.astype(NUMPY[scalar]), scalar, kind)

        operate.__name__ = self.name
        return operate


ARITHMETIC, BITS, ALL = (*FLOATS, *INTS), (*INTS, tl.int1), tuple(NUMPY)
OPERATIONS = [
    Operation("add", np.add, ARITHMETIC, bounded=True),
    Operation("sub", np.subtract, ARITHMETIC, bounded=True),
    Operation("mul", np.multiply, ARITHMETIC, bounded=True),
    Operation("truediv", np.divide, FLOATS, divides=True),
    Operation("and_", np.bitwise_and, BITS),
    Operation("or_", np.bitwise_or, BITS),
    Operation("xor_", np.bitwise_xor, BITS),
    Operation("shl", np.left_shift, INTS),
    Operation("lshr", np.right_shift, INTS),
    Operation("ashr", np.right_shift, INTS[:4]),
    Operation("less_than", np.less, ALL, compares=True),
    Operation("less_equal", np.less_equal, ALL, compares=True),
    Operation("greater_than", np.greater, ALL, compares=True),
    Operation("greater_equal", np.greater_equal, ALL, compares=True),
    Operation("equal", np.equal, ALL, compares=True),
    Operation("not_equal", np.not_equal, ALL, compares=True),
]


def with_pointers(add):
    """Addition, including pointers plus offsets."""

    def plan(left, right):
        scalar = left.scalar
        shape = common_shape(left, right)
        if not scalar.is_ptr() or right.scalar not in INTS or shape is None:
            return None
        return max(1, scalar.element_ty.primitive_bitwidth // 8), block(scalar, shape)

    plan_of = kept(plan)

    def add_pointers(self, left, right, sanitize_overflow):
        if type(left) is tensor and left.dtype.is_ptr():
            found, bytes_ = None, 0
            if type(right) is tensor:
                found = plan_of(left.type, right.type)
                if found is not None:
                    bytes_ = right.handle.data.astype(np.uint64) * found[0]
            elif type(right) is int and -(2**31) <= right < 2**31:
                found = plan_of(left.type, tl.int32)
                bytes_ = np.uint64(right * found[0] % 2**64) if found else 0
            if found is not None:
                return make(left.handle.data + bytes_, left.handle.dtype, found[1])
        return add(self, left, right, sanitize_overflow)

    add_pointers.__name__ = "add"
    return add_pointers


def cast_at_once(slow):
    def plan(source, to):
        scalar, target = source.scalar, to.scalar
        if scalar.is_ptr() or scalar not in NUMPY or target not in ARITHMETIC:
            return None
        return NUMPY[target], target, block(target, shape_of(source))

    plan_of = kept(plan)

    def cast(self, input, dst_ty, fp_downcast_rounding=None):
        if fp_downcast_rounding is None and type(input) is tensor:
            if input.dtype is dst_ty.scalar:
                return input
            found = plan_of(input.type, dst_ty.scalar)
            if found is not None:
                return make(input.handle.data.astype(found[0]), found[1], found[2])
        return slow(self, input, dst_ty, fp_downcast_rounding)

    return cast


def select_at_once(slow):
    def values(left, right):
        same = left.scalar is right.scalar and not left.scalar.is_ptr()
        scalar = left.scalar if same else common_scalar(left.scalar, right.scalar)
        shape = common_shape(left, right)
        if scalar is None or shape is None:
            return None
        casts = [None if x.scalar == scalar else NUMPY[scalar] for x in (left, right)]
        return *casts, scalar, block(scalar, shape)

    def result(condition, kind):
        shape = common_shape(condition, kind)
        return None if shape is None else block(kind.scalar, shape)

    values_of, result_of = kept(values), kept(result)

    def where(self, condition, x, y):
        if type(condition) is tensor and condition.dtype is tl.int1:
            found = None
            if type(x) is tensor:
                a = x.handle.data
                if type(y) is tensor:
                    b, found = y.handle.data, values_of(x.type, y.type)
                elif (b := number(y, x.dtype)) is not None:
                    found = values_of(x.type, x.type)
            elif type(y) is tensor and (a := number(x, y.dtype)) is not None:
                b, found = y.handle.data, values_of(y.type, y.type)
            kind = found and result_of(condition.type, found[3])
            if kind:
                a = a if found[0] is None else a.astype(found[0])
                b = b if found[1] is None else b.astype(found[1])
                return make(np.where(condition.handle.data, a, b), found[2], kind)
        return slow(self, condition, x, y)

    return where


def spread(x, kind):
    data = np.empty(shape_of(kind) or (1,), x.handle.data.dtype)
    data[...] = x.handle.data
    return make(data, x.handle.dtype.scalar, kind)


def operands_at_once(slow):
    """Patches the operand conversion of operations that have no class here."""

    def plans(divides):
        def plan(left, right):
            scalar = common_scalar(left.scalar, right.scalar, divides)
            shape = common_shape(left, right)
            return None if scalar is None or shape is None else (scalar, block(scalar, shape))

        return kept(plan)

    plan_of = {divides: plans(divides) for divides in (False, True)}

    def settled(x, scalar, kind):
        if x.type is kind:
            return x
        if x.dtype is not scalar:
            own = block(scalar, shape_of(x.type))
            x = make(x.handle.data.astype(NUMPY[scalar]), scalar, own)
        return x if x.type is kind else spread(x, kind)

    def check(
        self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True,
        div_or_mod=False,
    ):  # fmt: skip
        if arithmetic_check and type(lhs) is tensor and type(rhs) is tensor:
            found = plan_of[div_or_mod](lhs.type, rhs.type)
            if found is not None:
                return settled(lhs, *found), settled(rhs, *found)
        return slow(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return check


def broadcast_at_once(slow):
    def plan(left, right):
        shape = common_shape(left, right)
        if shape is None:
            return None
        return [None if shape_of(x) == shape else block(x.scalar, shape) for x in (left, right)]

    plan_of = kept(plan)

    def broadcast(self, lhs, rhs):
        found = plan_of(lhs.type, rhs.type)
        if found is None:
            return slow(self, lhs, rhs)
        return tuple(
            x if kind is None else spread(x, kind)
            for x, kind in zip((lhs, rhs), found, strict=True)
        )

    return broadcast


def expand_at_once(slow):
    def plan(kind, axis):
        shape = shape_of(kind)
        if not shape or not 0 <= axis <= len(shape):
            return None
        index = (slice(None),) * axis + (None,)
        return index, block(kind.scalar, (*shape[:axis], 1, *shape[axis:]))

    plan_of = kept(plan)  # small numbers are objects of their own

    def expand_dims(self, input, axis):
        found = plan_of(input.type, axis) if type(axis) is int else None
        if found is None:
            return slow(self, input, axis)
        return make(input.handle.data[found[0]], input.handle.dtype.scalar, found[1])

    return expand_dims


def numbers_at_once(slow):
    """The tensor of a number, for operations without a plan, mostly assignments."""

    def to_tensor(self, x, check_type=True):
        kind = type(x)
        if kind is tensor:
            return x
        if kind is int and -(2**31) <= x < 2**31:
            return make(np.array([x], np.int32), tl.int32, tl.int32)
        return slow(self, x, check_type)

    return to_tensor


def operators(functions):
    """Python operators, which call the operation without the language functions in between."""
    names = {
        "add": ("__add__", "__radd__", True),
        "sub": ("__sub__", "__rsub__", True),
        "mul": ("__mul__", "__rmul__", True),
        "truediv": ("__truediv__", "__rtruediv__"),
        "and_": ("__and__", "__rand__"),
        "or_": ("__or__", "__ror__"),
        "xor_": ("__xor__", "__rxor__"),
        "less_than": ("__lt__", "__rlt__"),
        "less_equal": ("__le__", "__rle__"),
        "greater_than": ("__gt__", "__rgt__"),
        "greater_equal": ("__ge__", "__rge__"),
        "equal": ("__eq__", "__req__"),
        "not_equal": ("__ne__", "__rne__"),
    }
    semantic = interpreter.interpreter_semantic

    def forms(function, sanitize):
        def there(self, other):
            other = other.value if type(other) is tl.constexpr else other
            return function(semantic, self, other, *sanitize)

        def back(self, other):
            other = other.value if type(other) is tl.constexpr else other
            return function(semantic, other, self, *sanitize)

        return there, back

    for name, (there, back, *sanitize) in names.items():
        for python, form in zip((there, back), forms(functions[name], sanitize), strict=True):
            setattr(tensor, python, form)


def hasten() -> None:
    if len(ORIGINAL) < len(REPLACED):
        return
    functions = {operation.name: operation.function for operation in OPERATIONS}
    functions["add"] = with_pointers(functions["add"])
    operators(functions)
    for name, at_once in {
        "cast": cast_at_once,
        "where": select_at_once,
        "broadcast_impl_value": broadcast_at_once,
        "binary_op_type_checking_impl": operands_at_once,
        "expand_dims": expand_at_once,
        "to_tensor": numbers_at_once,
    }.items():
        functions[name] = at_once(ORIGINAL[name])
    for name, function in functions.items():
        setattr(TritonSemantic, name, function)
