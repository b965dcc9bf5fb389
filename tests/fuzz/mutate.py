"""Edits that make a valid call malformed, or valid in an unusual way."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fuzz.targets import Arguments

# Describes a tensor of billions of elements, all of which a call may read.
EXPANDED = "huge, expanded"
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.complex64, torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
HUGE = (2**31 - 1, 2**31, 2**40, 2**62)
WHOLE = (-1, 0, 1, 2, 3, 5, 64, 128, 1000, -2, INT_MAX, INT_MIN, *HUGE, 2**63 - 1, 2**63, -(2**63))
REAL = (
    0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, 1e300, -1e300,
    float("nan"), float("inf"), float("-inf"), 2**1100,
)  # fmt: skip
TEXT = ("", "nonsense", "SOFTMAX", "mean", "low", "x" * 5000)


class Thing:
    """A value that is valid for no argument."""

    def __repr__(self) -> str:
        return "a thing"


class Unfit(Exception):
    """An edit that is impossible for this value."""


def mutate(
    rng: random.Random, known: tuple[str, ...], arguments: Arguments, donor: Callable[[], Arguments]
) -> list[str]:
    """Changes one to three arguments in place. Returns a description of the changes.

    donor returns another valid call, some of whose arguments are added.
    """
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        given = [name for name in arguments if name in known]
        if rng.random() < 0.2:
            given = [name for name in known if name not in arguments] or given
        name = rng.choice(given)
        try:
            if name not in arguments:
                value, text = _missing(rng, name, arguments, donor)
            else:
                value, text = _edit(rng, arguments[name], arguments)
        except (Unfit, RuntimeError):  # PyTorch cannot create such a tensor
            continue
        arguments[name] = value
        done.append(f"{name}: {text}")
    return done


def _missing(
    rng: random.Random, name: str, arguments: Arguments, donor: Callable[[], Arguments]
) -> tuple[Any, str]:
    if rng.random() < 0.6:
        value = donor().get(name)
        if value is not None:
            return value, "that of another call"
    return _anything(rng, arguments)


def _edit(rng: random.Random, value: Any, arguments: Arguments) -> tuple[Any, str]:
    if rng.random() < 0.1:
        return _anything(rng, arguments)
    if isinstance(value, Tensor):
        if is_extreme(value):
            raise Unfit  # an edit would copy it
        return rng.choice(_TENSOR_EDITS)(rng, value, arguments)
    if isinstance(value, bool):
        return _scalar(rng, rng.choice((not value, None, 0, 1, 2, "no", "True")), "bool_")
    if isinstance(value, int):
        near = (value, value - 1, value + 1, 2 * value, -value)
        return _scalar(rng, rng.choice((*near, *WHOLE, 1.5, True, None, "3")), "int64")
    if isinstance(value, float):
        return _scalar(rng, rng.choice((value, *REAL, 1, True, None, "0.5", 1j)), "float32")
    if isinstance(value, str):
        text = rng.choice((*TEXT, value.upper(), None, 3))
        return text, _show(text)
    if isinstance(value, tuple | list) and value:
        return _sequence(rng, list(value), arguments)
    return _anything(rng, arguments)


def _sequence(rng: random.Random, items: list[Any], arguments: Arguments) -> tuple[Any, str]:
    i = rng.randrange(len(items))
    change = rng.choice(("item", "item", "shorter", "longer", "list"))
    if change == "shorter":
        return tuple(items[:i] + items[i + 1 :]), f"without its item {i}"
    if change == "longer":
        return (*items, items[i]), "longer by an item"
    items[i], text = _edit(rng, items[i], arguments)
    return (items if change == "list" else tuple(items)), f"item {i}: {text}"


def _scalar(rng: random.Random, value: Any, numpy_type: str) -> tuple[Any, str]:
    """The value, or its equivalent as a scalar of NumPy or PyTorch."""
    form = rng.choice(("python", "python", "python", "numpy", "numpy", "tensor"))
    if form != "python" and isinstance(value, int | float) and abs(value) < 2**63:
        if form == "tensor":
            return torch.tensor(value), f"tensor({value})"
        if importlib.util.find_spec("numpy"):
            import numpy

            kind = rng.choice((numpy_type, "int32", "float32", "bool_"))
            if kind != "int32" or (value == value and abs(value) < 2**31):
                return getattr(numpy, kind)(value), f"numpy.{kind}({_show(value)})"
    return value, _show(value)


def _anything(rng: random.Random, arguments: Arguments) -> tuple[Any, str]:
    kind = rng.randrange(9)
    if kind == 0:
        return None, "None"
    if kind == 1:
        value: Any = rng.choice(WHOLE)
    elif kind == 2:
        value = rng.choice(REAL)
    elif kind == 3:
        value = rng.choice(TEXT)
    elif kind == 4:
        value = rng.choice(((), [], (1,), (1, 2, 3), {}, (None, None), [0.5], ("a", "b")))
    elif kind == 5:
        return Thing(), "a thing"
    elif kind == 6:
        others = [(n, v) for n, v in arguments.items() if isinstance(v, Tensor)]
        if not others:
            raise Unfit
        name, value = rng.choice(others)
        return value, f"the same tensor as {name}"
    elif kind == 7:
        value = rng.choice((True, False))
    else:
        shape = [rng.choice((0, 1, 2, 3, 33)) for _ in range(rng.randrange(6))]
        dtype = rng.choice(DTYPES)
        return torch.zeros(shape).to(dtype), f"zeros({shape}, {str(dtype)[6:]})"
    return _scalar(rng, value, "int64") if isinstance(value, int | float) else (value, _show(value))


def _show(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 60 else text[:57] + "..."


def _dtype(rng: random.Random, t: Tensor, arguments: Arguments) -> tuple[Any, str]:
    dtype = rng.choice(DTYPES)
    return t.detach().to(dtype), f"dtype {str(dtype)[6:]}"


def _rank(rng: random.Random, t: Tensor, arguments: Arguments) -> tuple[Any, str]:
    kind = rng.choice(("[None]", "[..., None]", "[0]", "flat", "scalar", "[:, None]"))
    if kind == "[None]":
        return t[None], kind
    if kind == "[..., None]":
        return t[..., None], kind
    if kind == "[0]" and t.dim() and t.shape[0]:
        return t[0], kind
    if kind == "[:, None]" and t.dim():
        return t[:, None], kind
    if kind == "scalar" and t.numel():
        return t.reshape(-1)[0], kind
    return t.reshape(-1), "flat"


def _size(rng: random.Random, t: Tensor, arguments: Arguments) -> tuple[Any, str]:
    if not t.dim():
        raise Unfit
    d = rng.randrange(t.dim())
    n = t.shape[d]
    kind = rng.choice(("zero", "zero", "less", "less", "more", "half", "one"))
    if kind == "more" and n:
        return torch.cat([t, t.narrow(d, 0, 1)], d), f"size {n + 1} along {d}"
    size = {"zero": 0, "less": max(n - 1, 0), "half": n // 2}.get(kind, min(n, 1))
    return t.narrow(d, 0, size), f"size {size} along {d}"


def _huge(rng: random.Random, t: Tensor, arguments: Arguments) -> tuple[Any, str]:
    """Expands one element, without allocating memory."""
    if rng.random() < 0.6 or not t.dim() or not t.numel():
        raise Unfit
    d, n = rng.randrange(t.dim()), rng.choice(HUGE)
    rest = t.numel() // t.shape[d]
    if rest * n >= 2**63:
        raise Unfit
    shape = [*t.shape[:d], n, *t.shape[d + 1 :]]
    return t.narrow(d, 0, 1).expand(shape), f"size {n} along {d}, {EXPANDED}"


def _strides(rng: random.Random, t: Tensor, arguments: Arguments) -> tuple[Any, str]:
    if not t.dim() or not t.numel():
        raise Unfit
    d = rng.randrange(t.dim())
    kind = rng.choice(("expand", "expand", "transposed", "step", "offset", "overlap", "odd"))
    if kind == "expand":
        return t.narrow(d, 0, 1).expand(t.shape), f"stride 0 along {d}"
    if kind == "transposed":
        e = rng.randrange(t.dim())
        return t.transpose(d, e).contiguous().transpose(d, e), f"memory in the order {d}, {e}"
    if kind == "step":
        return torch.stack([t, t], -1)[..., 0], "every second element"
    if kind == "offset":
        return torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape), "storage offset 1"
    if kind == "overlap":
        strides = [max(s // 2, 1) for s in t.contiguous().stride()]
        return t.contiguous().as_strided(t.shape, strides), f"overlapping strides {strides}"
    wide = t.new_zeros([n + 1 for n in t.shape])
    view = wide[tuple(slice(0, n) for n in t.shape)]
    return view.copy_(t.detach()), "part of a larger tensor"


def _views(rng: random.Random, t: Tensor, arguments: Arguments) -> tuple[Any, str]:
    if t.dtype == torch.float8_e4m3fn:
        raise Unfit
    if t.is_floating_point() and rng.random() < 0.5:
        return torch._neg_view(t.detach()), "a view with the negative bit"
    if t.dtype == torch.float32:
        return torch.complex(t.detach(), t.detach()).conj(), "a view with the conjugate bit"
    return torch._neg_view(t.detach()) if t.dtype != torch.bool else ~t, "negated"


def _values(rng: random.Random, t: Tensor, arguments: Arguments) -> tuple[Any, str]:
    if not t.numel() or t.is_complex():
        raise Unfit
    flat = t.detach().clone(memory_format=torch.contiguous_format).view(-1)
    some = [rng.randrange(t.numel()) for _ in range(rng.choice((1, 2, t.numel())))]
    if t.dtype == torch.bool:
        flat[some] = rng.random() < 0.5
        return flat.view(t.shape), "some values set"
    if t.is_floating_point():
        value = rng.choice([*REAL[:-1], torch.finfo(t.dtype).max, torch.finfo(t.dtype).min])
        flat[some] = torch.tensor(value, dtype=torch.float64).to(t.dtype)
        return flat.view(t.shape), f"{len(some)} values {value}"
    kind = rng.choice(("set", "set", "set", "descending", "equal", "behind"))
    if kind == "descending":
        return flat.sort(descending=True).values.view(t.shape), "values descending"
    if kind == "equal":
        return flat[:1].expand(t.numel()).clone().view(t.shape), "values all equal"
    limits = torch.iinfo(t.dtype)
    whole = rng.choice((-1, -2, 0, 7, 2**30, limits.min, limits.max))
    if kind == "behind":
        whole = int(flat.max()) + 1
    whole = min(max(whole, limits.min), limits.max)
    flat[some] = whole
    return flat.view(t.shape), f"{len(some)} values {whole}"


def _swap(rng: random.Random, t: Tensor, arguments: Arguments) -> tuple[Any, str]:
    kind = rng.choice(("meta", "list", "numpy", "parameter", "gradient", "None", "inference"))
    if kind == "meta":
        return t.detach().to("meta"), "on the device meta"
    if kind == "list" and not t.is_meta and t.numel() < 10000:
        return t.tolist(), "a list"
    # NumPy supports neither of these dtypes, nor tensors without data.
    foreign = t.is_meta or t.dtype in (torch.bfloat16, torch.float8_e4m3fn)
    if kind == "numpy" and not foreign and importlib.util.find_spec("numpy"):
        return t.detach().resolve_neg().numpy(), "an array of NumPy"
    if kind in ("parameter", "gradient") and t.is_floating_point():
        return torch.nn.Parameter(t.detach()), "requires a gradient"
    if kind == "inference":
        with torch.inference_mode():
            return t.clone(), "made in inference mode"
    return None, "None"


Edit = Callable[[random.Random, Tensor, Arguments], tuple[Any, str]]
_TENSOR_EDITS: tuple[Edit, ...] = (
    _dtype, _dtype, _rank, _size, _size, _size, _huge, _strides, _strides, _views, _values, _values,
    _values, _swap,
)  # fmt: skip


def is_extreme(value: Any) -> bool:
    """Whether a call with this argument may need more memory or time than available."""
    if isinstance(value, Tensor):
        number = value.dim() == 0 and value.dtype in (torch.int32, torch.int64)
        huge = number and not value.is_meta and is_extreme(int(value))
        return value.numel() >= 2**28 or huge
    if isinstance(value, tuple | list):
        return any(is_extreme(v) for v in value)
    if isinstance(value, dict):
        return any(is_extreme(v) for v in value.values())
    return isinstance(value, Integral) and abs(int(value)) >= 2**20
