"""Which backend and kernel run a call, and the reasons against the others."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _emulator, _knobs, registry
from ._call import autocast, library
from ._call.choose import BACKENDS, choose, interpreted, reasons, unsupported, wanted
from ._call.kernels import Kernel, table
from ._call.operator import native_keys
from ._call.rules import Like
from ._call.run import needs_autograd
from ._call.strides import empty_like, strided, with_rows
from ._check import InputError, fail
from ._other_names import refuse
from .registry import OpSpec, Sample


def missing(spec: OpSpec, sample: Sample, backend: str) -> list[str]:
    """The reasons why a backend's kernels do not support a sample."""
    return unsupported(spec, _kernels_of(backend), _lowered(spec, sample))


def able(spec: OpSpec, sample: Sample, backend: str) -> bool:
    """Whether a backend's kernels run a sample, and its gradients if it has any."""
    if backend == "reference" or not spec.unsupported:
        return True
    if not spec.gradients_of(sample):
        return not missing(spec, sample, backend)
    return not unsupported_gradients(spec, backend, _lowered(spec, sample))


def unsupported_gradients(spec: OpSpec, backend: str, lowered: tuple[Any, ...]) -> list[str]:
    """The reasons why a backend's kernels do not support a call whose inputs all require
    gradients.
    """
    call = spec.forward.record(*lowered)
    learning = {
        name: t.detach().requires_grad_()
        for name in spec.differentiable
        if isinstance(t := getattr(call, name), torch.Tensor) and t.is_floating_point()
    }
    return unsupported(spec, _kernels_of(backend), tuple(call._replace(**learning)))


def _kernels_of(backend: str) -> str:
    return "cuda" if backend == "emulated" else backend  # wherever the tensors are


def _lowered(spec: OpSpec, sample: Sample) -> tuple[Any, ...]:
    args, kwargs = sample.make(torch.float32, torch.Generator().manual_seed(0))
    return spec.lower(*args, **kwargs)


@dataclass(frozen=True)
class Explanation:
    """Answer of `explain`: the selected backend with its kernel, and the reasons against the
    others; for a device, against its other CUDA kernels. knobs: values, by name, of the knobs that
    select and partition the kernels for one kind of chip that could take the call: "32 (standard)"
    or "16 (tuned; standard 32)". copied: arguments that are copied first, because their last
    dimension is not contiguous.
    """

    op: str
    backend: str | None
    kernel: str | None
    against: dict[str, list[str]]
    error: str | None = None
    knobs: dict[str, str] = field(default_factory=dict)
    copied: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.error:
            lines = [f"tokenmill.{self.op}: this call is refused", f"  {self.error}"]
        else:
            lines = [f"tokenmill.{self.op}: {self.backend} ({self.kernel})"]
        if self.copied:
            names = ", ".join(self.copied)
            lines.append(f"  copied: {names} (the last dimension is not contiguous)")
        lines += [f"  {name}: {value}" for name, value in self.knobs.items()]
        lines += [f"  not {name}: {'; '.join(why)}" for name, why in self.against.items()]
        return "\n".join(lines)


def explain(
    op: str | Any,
    *args: Any,
    backend: str | None = None,
    device: str | None = None,
    **kwargs: Any,
) -> Explanation:
    """The backend and kernel that would run `op(*args, **kwargs)`, and the reasons against the
    others.

    op is the name of an operator or the public function. Nothing runs; for a call that would be
    refused the answer is its error. device names a chip, "sm_90" or "9.0": the answer is the kernel
    that the CUDA backend runs there, and why not its others, wherever the tensors are. This needs
    neither a GPU nor CUDA kernels in the build; a build without any answers for one with all of
    them. Complexity O(1).

    Example:
        >>> import torch, tokenmill as tm
        >>> q = torch.randn(1, 64, 2, 64, dtype=torch.float16)
        >>> print(tm.explain("attention", q, q, q).backend)
        cpu
        >>> print(tm.explain("attention", q, q, q, device="sm_90").kernel)
        csrc/dense/attention/kernel_sm90, float16
    """
    capability = None if device is None else _capability_of(device)
    if device is not None and backend not in (None, "cuda"):
        fail("explain", "backend", "must be 'cuda' or None with a device", backend)
    spec = registry.get(op if isinstance(op, str) else op.__name__)
    if spec.over_cache and kwargs.get("seqlens_k") is not None:
        spec = registry.get(spec.over_cache)
        kwargs.setdefault("causal", False)
    out = kwargs.pop("out", None) if spec.out is not None else None
    try:
        own = inspect.signature(spec.function).parameters
        if other := {name: value for name, value in kwargs.items() if name not in own}:
            refuse(spec.function, other)
        # Missing and superfluous arguments are a TypeError, as in a call of the function.
        inspect.signature(spec.function, follow_wrapped=False).bind(*args, **kwargs)
        if spec.as_packed is not None and getattr(args[0] if args else None, "is_nested", False):
            packed, ends = spec.as_packed(*args[:3], kwargs)
            args, kwargs = (*packed, *args[3:]), {**kwargs, **ends}
        lowered = spec.lower(*args, **kwargs)
        copied = tuple(strided(spec, spec.forward.named(lowered, {})))
        lowered = with_rows(spec, lowered, empty_like)
        if out is None and autocast.device_of(lowered):
            lowered = spec.forward.cast(lowered)
        spec.forward.check(*lowered, float64=True)
        if spec.out is not None and out is not None:
            record = spec.forward.record(*lowered)
            spec.out.check(*lowered, spec.lower_out(out, record), float64=True)
        if capability is not None:
            return _on_chip(spec, lowered, out, capability, copied)
        chosen = choose(spec, lowered, backend)
    except RuntimeError as error:
        return Explanation(spec.name, None, None, {}, str(error))
    against: dict[str, list[str]] = {}
    for name in BACKENDS:
        if name != chosen and (why := reasons(spec, name, lowered)):
            against[name] = why
        elif name != chosen:
            against[name] = [_passed_over(name, wanted(backend))]
    kernel = kernel_name(spec, chosen, lowered, out)
    knobs = {}
    if chosen in ("cuda", "emulated"):
        tables = _tables(spec, lowered, out)
        knobs = _knobs_of_call(tables, _current_capability(chosen, lowered)) if tables else {}
    return Explanation(spec.name, chosen, kernel, against, knobs=knobs, copied=copied)


def _passed_over(name: str, asked: str | None) -> str:
    if asked:
        return "not asked for"
    if interpreted(name):
        return "the interpreter runs only if asked for"
    return "comes later in the order of preference"


def kernel_name(
    spec: OpSpec, backend: str, lowered: tuple[Any, ...], out: torch.Tensor | None = None
) -> str:
    dtype = str(_first(lowered).dtype)[6:]
    if backend == "cpu":
        return f"csrc/{spec.family}/{spec.name}, {library.native.cpu_isa()}, {dtype}"
    if backend in ("cuda", "emulated"):
        tables = _tables(spec, lowered, out)
        capability = _current_capability(backend, lowered) if tables else 0
        machine = " in the PTX machine" if backend == "emulated" else ""
        return f"{_cuda_kernel(spec, tables, capability)}{machine}, {dtype}"
    if backend == "triton":
        return f"triton_kernels/{spec.forward.triton}, {dtype}"
    return f"reference/{spec.family}/{spec.name}, plain PyTorch, {dtype}"


def _capability_of(device: str) -> int:
    """Compute capability of a chip by name, as 10 major + minor."""
    named = re.fullmatch(r"sm_([0-9]{2,3})[af]?|([0-9]{1,2})\.([0-9])", str(device))
    capability = int(named[1] or named[2] + named[3]) if named else 0
    if capability < 80:
        rule = "must be a chip of compute capability 8.0 or later, as 'sm_90' or '9.0'"
        fail("explain", "device", rule, device)
    return capability


def _current_capability(backend: str, lowered: tuple[Any, ...]) -> int:
    """Compute capability of the device that runs the call."""
    if backend == "emulated":
        return _capability_of(_emulator.device())
    major, minor = torch.cuda.get_device_capability(_first(lowered).device)
    return 10 * major + minor


def _tables(spec: OpSpec, lowered: tuple[Any, ...], out: torch.Tensor | None) -> list[list[Kernel]]:
    """The CUDA kernels of the passes of a call: the forward, and the backward if it has a table and
    the call needs one. Empty for an operator with one kernel.
    """
    record = spec.forward.record(*lowered)
    if spec.out is not None and out is not None:
        forward = table(spec.out, (*lowered, spec.lower_out(out, record)))
    else:
        forward = table(spec.forward, record)
    if not forward:
        return []
    backward = _backward_table(spec, record) if needs_autograd(lowered) else []
    return [forward, backward] if backward else [forward]


def _backward_table(spec: OpSpec, record: Any) -> list[Kernel]:
    """Cotangents are described as contiguous tensors."""
    if spec.backward is None:
        return []
    names, device = spec.forward.results, _first(record).device
    given = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in record]
    made = spec.forward.fake(spec.forward.record(*given))
    results = dict(zip(names, made if isinstance(made, tuple) else (made,), strict=True))
    like = {name: Like(t, device) for name, t in results.items()}
    values = record._asdict() | like | {f"d{name}": t for name, t in like.items()}
    for name in spec.backward.arguments:
        if name.startswith("needs_d"):
            t = getattr(record, name.removeprefix("needs_d"))
            values[name] = t is not None and t.requires_grad
    try:
        return table(spec.backward, [values[name] for name in spec.backward.arguments])
    except InputError:
        return []  # this call has no gradient


def _first(values: Iterable[Any]) -> torch.Tensor:
    return next(t for t in values if isinstance(t, torch.Tensor))


def _reasons(row: Kernel, rows: list[Kernel], capability: int) -> list[str]:
    """The reasons why a chip does not run a kernel. Its absence from the build counts if the build
    has CUDA kernels at all.
    """
    why = []
    if not row.fits(capability):
        why.append(f"device: must be {row.chips}; got sm_{capability}")
    if not row.built and rows[-1].built:
        why.append(f"the build has no {row.arch}")
    return [*why, *row.broken, *_knobs.refusals(row.switch)]


def _taken(rows: list[Kernel], capability: int) -> Kernel:
    """The first kernel of a table that runs a call; the last one takes every call."""
    return next((r for r in rows[:-1] if not _reasons(r, rows, capability)), rows[-1])


def _on_chip(
    spec: OpSpec,
    lowered: tuple[Any, ...],
    out: torch.Tensor | None,
    capability: int,
    copied: tuple[str, ...],
) -> Explanation:
    first = _first(lowered)
    why = ["float64 runs only on the reference backend"] if first.dtype == torch.float64 else []
    if why := why + unsupported(spec, "cuda", lowered):
        rule = f"tokenmill.{spec.name}: backend: 'cuda' cannot run this call: {'; '.join(why)}"
        return Explanation(spec.name, None, None, {}, rule)
    tables = _tables(spec, lowered, out)
    taken = [_taken(rows, capability) for rows in tables]
    against = {
        row.full_name: why
        for rows, run in zip(tables, taken, strict=True)
        for row in rows[:-1]
        if row is not run and (why := _reasons(row, rows, capability))
    }
    name = taken[0].full_name if taken else f"csrc/{spec.family}/{spec.name}"
    if len(tables) > 1 and (taken[0] is not tables[0][-1] or taken[1] is not tables[1][-1]):
        name += f" and {_backward_name(taken[1], tables[1])}"
    kernel = f"{name}, {str(first.dtype)[6:]}"
    knobs = _knobs_of_call(tables, capability)
    return Explanation(spec.name, "cuda", kernel, against, knobs=knobs, copied=copied)


def _backward_name(taken: Kernel, rows: list[Kernel]) -> str:
    return f"{taken.name}'s backward" if taken is rows[-1] else taken.base


def _cuda_kernel(spec: OpSpec, tables: list[list[Kernel]], capability: int) -> str:
    """The kernels of a call, and why not those for this kind of chip."""
    if not tables:
        return f"csrc/{spec.family}/{spec.name}"
    parts: list[str] = []
    for rows in tables:
        fitting = [row for row in rows[:-1] if row.fits(capability)]
        if not fitting:
            continue
        taken = _taken(rows, capability)
        name = _backward_name(taken, rows) if rows is not tables[0] else taken.full_name
        if not fitting[0].built and rows[-1].built:
            return f"{rows[-1].name} (not {fitting[0].base}: the build has no {fitting[0].arch})"
        why = f" ({_refused(fitting)})" if taken is rows[-1] else ""
        parts.append(name + why)
    return " and ".join(parts or [tables[0][-1].name])


def _refused(rows: list[Kernel]) -> str:
    """Why not the kernels for this kind of chip, without those that are meant for other calls."""
    meant = [row for row in rows if not row.other_calls] or rows
    free = [row for row in meant if not row.broken]
    reasons: dict[str, dict[str, None]] = {}  # by kernel; each reason once
    for row in free[:1] or meant:
        reasons.setdefault(row.base, {}).update(dict.fromkeys(row.broken))
    for row in free[:1] or meant:
        reasons[row.base].update(dict.fromkeys(_knobs.refusals(row.switch)))
    return "; ".join(f"not {base}: {'; '.join(why)}" for base, why in reasons.items())


def _knobs_of_call(tables: list[list[Kernel]], capability: int) -> dict[str, str]:
    """Knobs that select and partition kernels for this kind of chip that could take the call."""
    names: list[str] = []
    for rows in tables:
        built = [row for row in rows if row.built or not rows[-1].built]
        switched: list[str] = []
        cuts: list[str] = []
        read: list[str] = []
        for row in (row for row in built if row.switch and row.fits(capability)):
            if not row.broken:
                switched.append(row.switch)
            if _knobs.value(row.switch):
                read += row.read
                cuts += [] if row.broken else row.cuts
                if not row.broken:
                    break
        names += [*switched, *cuts, *read]
    return {name: _knobs.shown(name) for name in names}


def switches(spec: OpSpec, capability: int) -> set[str]:
    """The knobs that switch kernels of this build for one kind of chip."""
    args, kwargs = spec.samples[0].make(torch.float32, torch.Generator().manual_seed(0))
    record = spec.record(*args, **kwargs)
    rows = table(spec.forward, record) + _backward_table(spec, record)
    return {row.switch for row in rows if row.switch and row.built and row.fits(capability)}


def kernels(spec: OpSpec, backend: str) -> str:
    """A backend's kernels of an operator in this build: "yes", "forward" (without its backward) or
    "-".
    """
    if backend == "reference":
        return "yes"
    if backend == "triton":
        found = [op.triton is not None for op in spec.torch_ops]
    elif backend == "emulated":
        found = [op.has_emulated() for op in spec.torch_ops]
    else:
        found = [op.has_native(backend.upper()) for op in spec.torch_ops]
    return "yes" if all(found) else "forward" if found[0] else "-"


def backends() -> dict[str, str]:
    """Each backend with "available" or the reason why it is not available on this machine.

    Example:
        >>> import tokenmill as tm
        >>> tm.backends()["reference"]
        'available'
    """
    cuda = torch.cuda.is_available()
    built = any(key == "CUDA" for _, key in native_keys)
    triton = library.triton_installed()
    states = {
        "cpu": f"available ({library.native.cpu_isa()})",
        "cuda": "available" if cuda and built else ("no GPU" if built else "not in this build"),
        "triton": (
            "not installed"
            if not triton
            else "available"
            if cuda
            else "no GPU (TRITON_INTERPRET=1 interprets)"
            if not library.triton_interpreted()
            else library.interpreter_fault() or "interpreter"
        ),
        "emulated": "interpreter",
        "reference": "available",
    }
    return {name: states[name] for name in BACKENDS}
