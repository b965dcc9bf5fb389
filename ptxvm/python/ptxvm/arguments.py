"""Arguments of a kernel as text: 3, f32=0.5, f32[1024]=arange, bf16[64,128]=random:7,
"const i32[10]=lengths.npy", and bytes:00ff for a struct that goes by value."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TYPES: dict[str, Any] = {
    **{f"{kind}{bits}": np.dtype(f"{name}{bits}") for bits in (8, 16, 32, 64)
       for kind, name in (("i", "int"), ("s", "int"), ("u", "uint"), ("b", "uint"))},
    **{f"f{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "bf16": np.dtype("uint16"),
}  # fmt: skip
FORM = "must be VALUE, TYPE=VALUE or [const ]TYPE[SIZES]=CONTENTS"
CONTENTS = "zeros, ones, nan, arange, random[:SEED], a number, FILE.npy or bytes:HEX"
_ARRAY = re.compile(r"(?P<const>const\s+)?(?P<type>\w+)\[(?P<sizes>[\d,\s]+)\]=(?P<value>.+)")
_SCALAR = re.compile(r"((?P<type>[a-z]+\d+)=)?(?P<value>[^=]+)")
MAX_SIZES = 32  # NumPy's maximum number of dimensions
COPIES = 4  # of an array: initial, after the first run, after another, and a temporary
ALIGNMENT = 256  # bytes


@dataclass(frozen=True)
class Parameter:
    type: str  # u64, f32, b8, ...
    name: str
    count: int  # elements of an array in the parameter itself, such as a struct; 0: a scalar
    bytes: int

    def __str__(self) -> str:
        return f".{self.type} {self.name}" + (f"[{self.count}]" if self.count else "")


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, name: str, parameters: Iterable[Mapping[str, Any]]) -> Kernel:
        """Builds a Kernel from an entry of Module.parameters."""
        return cls(name, tuple(Parameter(**p) for p in parameters))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.parameters))})"


class BadArgument(ValueError):
    """`rule; got value`."""


def make(text: str, parameter: Parameter | None) -> Any:
    """A NumPy array, passed to the kernel as a pointer, or a scalar of the parameter's type."""
    if found := _ARRAY.fullmatch(text):
        return _array(text, found)
    if found := _SCALAR.fullmatch(text):
        return _scalar(text, found, parameter)
    raise BadArgument(f"{FORM}; got '{text}'")


def _dtype(name: str) -> Any:
    if name not in TYPES:
        raise BadArgument(f"type must be one of {', '.join(TYPES)}; got '{name}'")
    return TYPES[name]


def _scalar(text: str, found: re.Match[str], parameter: Parameter | None) -> Any:
    kind = found["type"] or (parameter and parameter.type)
    if parameter and not found["type"] and (parameter.count or parameter.type not in TYPES):
        return _filled(np.empty(1, f"V{parameter.bytes}"), parameter.type, found["value"])[0]
    if not kind:
        raise BadArgument(f"must name its type (TYPE=VALUE); got '{text}'")
    return _filled(np.empty(1, _dtype(kind)), kind, found["value"])[0]


def _array(text: str, found: re.Match[str]) -> Any:
    dtype = _dtype(found["type"])
    sizes = [int(size) for size in found["sizes"].split(",") if size.strip()]
    if not 1 <= len(sizes) <= MAX_SIZES:
        raise BadArgument(f"sizes must be 1 to {MAX_SIZES} whole numbers; got '{text}'")
    maximum = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // COPIES
    if math.prod(sizes) * dtype.itemsize > maximum:
        raise BadArgument(f"must have at most {maximum} bytes, 1/{COPIES} of memory; got '{text}'")
    array = _filled(_allocated(sizes, dtype), found["type"], found["value"].strip())
    array.flags.writeable = found["const"] is None
    return array


def _allocated(sizes: list[int], dtype: Any) -> Any:
    """Empty array with the alignment of cudaMalloc, so that counters are the same in every run."""
    size = math.prod(sizes) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(sizes)


def _filled(array: Any, kind: str, contents: str) -> Any:
    """Fills the array as the text says and returns it."""
    word, _, rest = contents.partition(":")
    if array.dtype.kind == "V" and word != "bytes":
        raise BadArgument(f"must be bytes:HEX, {array.nbytes} bytes; got '{contents}'")
    if contents.endswith(".npy"):
        array[...] = _loaded(array, kind, contents)
    elif word == "bytes":
        array[...] = _bytes(array, rest)
    elif word == "random" and re.fullmatch(r"\d*", rest):
        array[...] = _converted(kind, _random(kind, array.shape, int(rest or 0)))
    elif contents == "arange":
        array[...] = _converted(kind, np.arange(array.size).reshape(array.shape))
    else:
        array[...] = _converted(kind, _number(kind, contents))
    return array


def _random(kind: str, shape: tuple[int, ...], seed: int) -> Any:
    """Normally distributed for floating point; else integers from 0 to 99."""
    generator = np.random.default_rng(seed)
    if "f" in kind:
        return generator.standard_normal(shape)
    return generator.integers(0, 100, shape)


def _number(kind: str, text: str) -> Any:
    named = {"zeros": "0", "ones": "1"}.get(text, text)
    parse: Callable[[str], Any] = float if "f" in kind else lambda x: int(x, 0)
    try:
        value = parse(named)
        if "f" not in kind:
            np.array(value, TYPES[kind])  # raises OverflowError
        elif math.isfinite(value) and not np.isfinite(readable(_converted(kind, value), kind)):
            raise OverflowError
        return value
    except (ValueError, OverflowError):
        raise BadArgument(f"must be {CONTENTS}, of {kind}; got '{text}'") from None


def _loaded(array: Any, kind: str, name: str) -> Any:
    try:
        with Path(name).open("rb") as file:
            loaded = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadArgument(f"must be a readable .npy file; got '{name}' ({error})") from None
    rounded = kind == "bf16" and loaded.dtype == np.float32  # float32, as from readable()
    if loaded.shape != array.shape or not (rounded or loaded.dtype == array.dtype):
        raise BadArgument(
            f"must hold {array.dtype}{list(array.shape)}; got '{name}' with "
            f"{loaded.dtype}{list(loaded.shape)}"
        )
    return _converted(kind, loaded) if rounded else loaded


def _bytes(array: Any, text: str) -> Any:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != array.nbytes:
        raise BadArgument(f"must be {array.nbytes} bytes in hexadecimal; got 'bytes:{text}'")
    return np.frombuffer(data, array.dtype).reshape(array.shape)


def _converted(kind: str, values: Any) -> Any:
    """Values converted to the element type; bf16 is rounded to nearest even and stored as u16."""
    if kind != "bf16":
        with np.errstate(over="ignore"):  # overflow becomes infinity
            return np.asarray(values).astype(TYPES[kind])
    with np.errstate(over="ignore"):
        bits = np.atleast_1d(np.asarray(values, np.float32)).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    narrow = np.where(nan, 0x7FC0, rounded).astype(np.uint16)
    return narrow.reshape(np.shape(values)) if np.ndim(values) else narrow[0]


def readable(array: Any, kind: str) -> Any:
    """Values of an array of element type `kind`; bf16 is converted to float32."""
    return (np.asarray(array, np.uint32) << 16).view(np.float32) if kind == "bf16" else array


def kind_of(text: str) -> str:
    """Element type named in an argument; "" if it names none."""
    found = re.match(r"(?:const\s+)?(\w+)(?:\[[\d,\s]+\])?=", text)
    return found[1] if found else ""


def for_kernel(kernel: Kernel, texts: list[str]) -> list[Any]:
    """Arguments of a launch, one for each parameter of the kernel."""
    if len(texts) != len(kernel.parameters):
        raise BadArgument(f"must be given once for each parameter of {kernel}; got {len(texts)}")
    made = []
    for i, (text, parameter) in enumerate(zip(texts, kernel.parameters, strict=True)):
        try:
            value = make(text, parameter)
        except BadArgument as error:
            raise BadArgument(f"number {i} ({parameter}) {error}") from None
        _check_size(i, text, value, parameter)
        made.append(value)
    return made


def _check_size(i: int, text: str, value: Any, parameter: Parameter) -> None:
    given = 8 if isinstance(value, np.ndarray) else value.nbytes
    if given != parameter.bytes:
        rule = f"must have {parameter.bytes} bytes"
        raise BadArgument(f"number {i} ({parameter}) {rule}; got '{text}'")
