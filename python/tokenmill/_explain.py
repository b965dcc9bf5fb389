"""Which backend and kernel run a call, and the reasons against the others."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _emulator, _knobs, registry
from ._call import autocast, library
from ._call.choose import BACKENDS, choose, interpreted, reasons, unsupported, wanted
from ._call.operator import native_keys
from ._call.run import needs_autograd
from ._call.strides import empty_like, strided, with_rows
from ._info import build_info
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
    others. knobs: values, by name, of the knobs that select and partition the sm_90a kernels that
    could take the call: "32 (standard)" or "16 (tuned; standard 32)". copied: arguments that are
    copied first, because their last dimension is not contiguous.
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


def explain(op: str | Any, *args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """The backend and kernel that would run `op(*args, **kwargs)`, and the reasons against the
    others.

    op is the name of an operator or the public function. Nothing runs; for a call that would be
    refused the answer is its error. Complexity O(1).

    Example:
        >>> import torch, tokenmill as tm
        >>> q = torch.randn(1, 16, 2, 64)
        >>> print(tm.explain("attention", q, q, q).backend)
        cpu
    """
    spec = registry.get(op if isinstance(op, str) else op.__name__)
    if spec.over_cache and kwargs.get("seqlens_k") is not None:
        spec = registry.get(spec.over_cache)
        kwargs.setdefault("causal", False)
    out = kwargs.pop("out", None) if spec.out is not None else None
    try:
        own = inspect.signature(spec.function).parameters
        if other := {name: value for name, value in kwargs.items() if name not in own}:
            refuse(spec.name, spec.function, other)
        if spec.as_packed is not None and getattr(args[0] if args else None, "is_nested", False):
            packed, ends = spec.as_packed(*args[:3], kwargs)
            args, kwargs = (*packed, *args[3:]), {**kwargs, **ends}
        lowered = spec.lower(*args, **kwargs)
        copied = tuple(strided(spec, lowered))
        lowered = with_rows(spec, lowered, empty_like)
        if out is None and autocast.device_of(lowered):
            lowered = spec.forward.cast(lowered)
        spec.forward.check(*lowered, float64=True)
        if spec.out is not None and out is not None:
            record = spec.forward.record(*lowered)
            spec.out.check(*lowered, spec.lower_out(out, record), float64=True)
        chosen = choose(spec, lowered, backend)
    except RuntimeError as error:
        return Explanation(spec.name, None, None, {}, str(error))
    against = {}
    for name in BACKENDS:
        if name != chosen and (why := reasons(spec, name, lowered)):
            against[name] = why
        elif name != chosen:
            against[name] = [_passed_over(name, wanted(backend))]
    kernel = kernel_name(spec, chosen, lowered, out)
    knobs = _knobs_of_call(spec, chosen, lowered, out)
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
    dtype = str(next(t for t in lowered if isinstance(t, torch.Tensor)).dtype)[6:]
    if backend == "cpu":
        return f"csrc/{spec.family}/{spec.name}, {library.native.cpu_isa()}, {dtype}"
    if backend == "cuda":
        return f"{_cuda_kernel(spec, backend, lowered, out)}, {dtype}"
    if backend == "emulated":
        return f"{_cuda_kernel(spec, backend, lowered, out)} in the PTX machine, {dtype}"
    if backend == "triton":
        return f"triton_kernels/{spec.forward.triton}, {dtype}"
    return f"reference/{spec.family}/{spec.name}, plain PyTorch, {dtype}"


def _cuda_kernel(
    spec: OpSpec, backend: str, lowered: tuple[Any, ...], out: torch.Tensor | None
) -> str:
    name = f"csrc/{spec.family}/{spec.name}"
    if spec.unsupported_sm90 is None or not _is_sm90(backend, lowered):
        return name
    if backend == "cuda" and not builds_sm90():
        return f"{name} (not kernel_sm90: the build has no 90a)"
    why = spec.unsupported_sm90(*lowered, out=out) + _knobs.refusals(f"{spec.name}.sm90")
    if why:
        forward = f"{name} (not kernel_sm90: {'; '.join(why)})"
    else:
        forward = spec.sm90_kernel(*lowered) if spec.sm90_kernel else f"{name}/kernel_sm90"
    if spec.unsupported_sm90_backward is None or not needs_autograd(lowered):
        return forward
    why = spec.unsupported_sm90_backward(*lowered)
    if why := why + _knobs.refusals(f"{spec.name}.sm90_backward"):
        return f"{forward} and {name}'s backward (not kernel_backward_sm90: {'; '.join(why)})"
    return f"{forward} and kernel_backward_sm90"


def _knobs_of_call(
    spec: OpSpec, backend: str, lowered: tuple[Any, ...], out: torch.Tensor | None
) -> dict[str, str]:
    """Knobs that select and partition the sm_90a kernels that could take the call."""
    asks = backend in ("cuda", "emulated") and spec.unsupported_sm90 is not None
    if not asks or not _is_sm90(backend, lowered) or (backend == "cuda" and not builds_sm90()):
        return {}
    assert spec.unsupported_sm90 is not None
    names: list[str] = []
    if spec.sm90_knobs:
        names += spec.sm90_knobs(*lowered, out=out)
    elif not spec.unsupported_sm90(*lowered, out=out):
        names += _knobs.of_sm90(spec.name, "forward")
    backward = spec.unsupported_sm90_backward
    if backward is not None and needs_autograd(lowered) and not backward(*lowered):
        names += _knobs.of_sm90(spec.name, "backward")
    return {name: _knobs.shown(name) for name in names}


def builds_sm90() -> bool:
    """Whether this build contains the sm_90a kernels."""
    archs = build_info().get("cuda_archs")  # None without tokenmill._C
    return archs is None or any(a.startswith("90a") for a in archs)


def _is_sm90(backend: str, lowered: tuple[Any, ...]) -> bool:
    """Whether the device has compute capability 9.0."""
    if backend == "emulated":
        return _emulator.device() == "sm_90a"
    device = next(t for t in lowered if isinstance(t, torch.Tensor)).device
    return torch.cuda.get_device_capability(device) == (9, 0)


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
