"""The rules of a call, asked from the checks of C++ (csrc/<family>/<op>/host.cpp) with a
description of its arguments, without tensors.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._check import InputError, fail
from .library import LIBRARY_PATH

# Numbers of dtypes (c10/core/ScalarType.h).
_DTYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.complex32: 8,
    torch.complex64: 9,
    torch.complex128: 10,
    torch.bool: 11,
    torch.bfloat16: 15,
    torch.float8_e5m2: 23,
    torch.float8_e4m3fn: 24,
    torch.float8_e5m2fnuz: 25,
    torch.float8_e4m3fnuz: 26,
    torch.uint16: 27,
    torch.uint32: 28,
    torch.uint64: 29,
    torch.float8_e8m0fnu: 44,
    torch.float4_e2m1fn_x2: 45,
}
_META, _NOWHERE = -2, 256  # kMeta and kNowhere of csrc/core/array.h
_CAPACITY = 4096
_ERRORS = "surrogatepass"  # text that is no UTF-8 comes back as it was
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)

symbols = ctypes.CDLL(str(LIBRARY_PATH))
_ask_rules: Any = symbols.tokenmill_rules
_ask_rules.restype = ctypes.c_int64
_ask_rules.argtypes = [ctypes.c_char_p] * 4 + [ctypes.c_int32, ctypes.c_char_p, ctypes.c_int64]
_ask_written: Any = symbols.tokenmill_written
_ask_written.restype = ctypes.c_int64
_ask_written.argtypes = [ctypes.c_char_p] * 4 + [ctypes.c_int64]


class _NoHint(Exception):
    """A size or number of a traced call has no known value."""


def broken_rule(
    op: str, kinds: Sequence[str], values: Sequence[Any], *, float64: bool = False
) -> str | None:
    """The message about the first rule of the operator that metadata of its arguments breaks.
    kinds are those of the schema: "Tensor", "int", "float", "bool" or "str". float64: whether it is
    a valid dtype. Traced sizes count with the values of the trace, and no guard is added; without
    them the operator checks when it runs. Memory (overlap of written arguments) is checked where
    tensors have any.
    """
    try:
        described = describe(kinds, values)
    except _NoHint:
        return None
    _, message = ask(_ask_rules, op, *described, float64)
    return message or None


def check_written(op: str, name: str, t: Tensor, read: dict[str, Tensor | None]) -> None:
    """A written argument must not be a lazy negative or conjugate, must have no overlapping
    elements, and must share no element with an input. Where there are no addresses (while tracing a
    graph), the kernel checks when it runs.
    """
    if torch.compiler.is_dynamo_compiling():  # Dynamo can trace none of this
        return
    if t.is_neg() or t.is_conj():
        fail(op, name, "must not be a negative or conjugate view", t)
    if not address_of(t):
        return
    arrays = {name: t} | {n: x for n, x in read.items() if x is not None and address_of(x)}
    names = "".join(f"{n}\n" for n in arrays)
    words, _, _ = describe(["Tensor"] * len(arrays), [*arrays.values()])
    _, message = ask(_ask_written, op, names.encode(), words)
    if message:
        raise InputError(message)


def ask(function: Any, op: str, *arguments: Any) -> tuple[int, str]:
    """The status and the text that a function of csrc/core/rules.cpp answers about an operator. The
    status is the length of the text or, for a message in its place, -2 - length.
    """
    length = capacity = _CAPACITY
    while length >= capacity:  # a value that the text shows may be of any length
        capacity = length + 1
        text = ctypes.create_string_buffer(capacity)
        status = function(op.encode(), *arguments, text, capacity)
        length = max(status, -2 - status)
    assert status != -1, op
    return status, text.raw[:length].decode(errors=_ERRORS)


def describe(kinds: Sequence[str], values: Sequence[Any]) -> tuple[bytes, bytes, bytes]:
    """Words, numbers and text as csrc/core/rules.cpp reads them: 0 for None, otherwise 1 and what
    the kind needs.
    """
    words: list[int] = []
    numbers: list[float] = []
    text: list[bytes] = []
    for kind, value in zip(kinds, values, strict=True):
        if value is None:
            words.append(0)
            continue
        words.append(1)
        if kind == "Tensor":
            _describe(value, words)
        elif kind == "str":
            text.append(value.encode(errors=_ERRORS))
            words.append(len(text[-1]))
        else:
            number = _hint(value) if isinstance(value, _SYMBOLS) else value
            (numbers if kind == "float" else words).append(number)
    packed = struct.pack(f"{len(words)}q", *words), struct.pack(f"{len(numbers)}d", *numbers)
    return (*packed, b"".join(text))


@dataclass(frozen=True)
class Like:
    """Describes a tensor without memory, on a device."""

    tensor: Tensor
    device: torch.device


def _describe(t: Tensor | Like, words: list[int]) -> None:
    device = t.device
    t = t.tensor if isinstance(t, Like) else t
    on_gpu = device.type not in ("cpu", "meta")
    index = device.index or 0 if on_gpu else _META if device.type == "meta" else 0
    address = address_of(t)
    if address is None:
        address = _NOWHERE
    words += (t.dim(), _DTYPES.get(t.dtype, -1), t.element_size(), on_gpu, index, address)
    words += [n if type(n) is int else _hint(n) for n in t.shape]
    words += [n if type(n) is int else _hint(n) for n in t.stride()]


def address_of(t: Tensor) -> int | None:
    """The address, 0 for a tensor without elements; None for one without its own memory: meta, fake
    or another subclass, or wrapped by a transform.
    """
    if (type(t) is not Tensor and type(t) is not torch.nn.Parameter) or t.is_meta:
        return None
    try:
        return t.data_ptr()
    except RuntimeError:
        return None


def _hint(value: Any) -> Any:
    """The value of a symbol in the trace, without a guard."""
    node = value.node
    if node.hint is None:
        raise _NoHint
    return node.hint
