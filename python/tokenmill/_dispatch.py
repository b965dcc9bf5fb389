"""Backend selection, and the reasons against the other backends."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import _autocast, _emulator, _knobs, _library
from ._check import InputError, fail, synchronising_checks
from ._derivatives import below_autograd, note_writes, refuse_gradient, transformed
from ._door import compiling
from ._info import build_info
from ._other_names import refuse
from ._sharded import sharding_of
from ._strides import empty_like, strided, with_rows

if TYPE_CHECKING:
    from .registry import OpSpec, Sample

# In order of preference. "emulated" is the CUDA kernel in the PTX machine: it only runs on request.
ALL_BACKENDS = ("cpu", "cuda", "triton", "emulated", "reference")
BACKENDS = tuple(b for b in ALL_BACKENDS if b != "emulated" or _library.emulated_built())
_asked: str | None = None  # set by testing.emulated_cuda


def reasons(spec: OpSpec, backend: str, lowered: tuple[Any, ...]) -> list[str]:
    """The reasons why `backend` cannot run the call; empty if it can."""
    if backend == "reference":
        return []
    first: torch.Tensor = next(t for t in lowered if isinstance(t, torch.Tensor))
    device = first.device.type
    why = []
    if first.dtype == torch.float64:
        why.append("float64 runs only on the reference backend")
    if backend == "cpu":
        if device != "cpu":
            why.append(f"the tensors are on {device}")
        if not spec.forward.has_native("CPU"):
            why.append("no native CPU kernel in this build")
    elif backend == "cuda":
        if device != "cuda":
            why.append(f"the tensors are on {device}")
        if not spec.forward.has_native("CUDA"):
            why.append("no native CUDA kernel in this build (TOKENMILL_CUDA=1 builds them)")
    elif backend == "emulated":
        if not _library.emulated_built():
            return ["not in this build (TOKENMILL_PTXVM=1)"]
        if device != "cpu":
            why.append(f"the tensors are on {device}")
        if not spec.forward.has_emulated():
            why.append("no native CUDA kernel in this build")
        return why + unsupported(spec, "cuda", lowered)
    else:
        if spec.forward.triton is None:
            why.append("the operator has no Triton kernel")
        elif not _library.triton_installed():
            why.append("Triton is not installed (pip install tokenmill[triton])")
        elif device == "cpu" and not _library.triton_interpreted():
            why.append("the tensors are on cpu (TRITON_INTERPRET=1 runs the kernel's interpreter)")
        elif device == "cpu" and (fault := _library.interpreter_fault()):
            why.append(fault)
    return why + unsupported(spec, backend, lowered)


def unsupported(spec: OpSpec, backend: str, lowered: tuple[Any, ...]) -> list[str]:
    """The reasons why a backend's kernels do not support a call, wherever its tensors are."""
    return spec.unsupported(backend, *lowered) if spec.unsupported else []


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


def choose(
    spec: OpSpec, lowered: tuple[Any, ...], backend: str | None = None, op: str | None = None
) -> str:
    """The backend that runs the call: the requested one (argument, testing.emulated_cuda, then
    TOKENMILL_BACKEND), or the first of BACKENDS that supports it. The reference always does;
    interpreters only run on request. Errors name op, or the operator itself.
    """
    op = op or spec.name
    backend = _wanted(backend)
    if backend is None:
        for candidate in BACKENDS:
            if not _interpreted(candidate) and not reasons(spec, candidate, lowered):
                return candidate
        raise AssertionError("unreachable: the reference backend runs every call")
    if not isinstance(backend, str) or backend not in ALL_BACKENDS:
        fail(op, "backend", f"must be one of {', '.join(BACKENDS)} or None", backend)
    if why := reasons(spec, backend, lowered):
        if spec.unsupported:  # for a malformed call the error names the broken rule
            spec.forward.check(*lowered, float64=True)
        raise InputError(
            f"tokenmill.{op}: backend: '{backend}' cannot run this call: {'; '.join(why)}"
        )
    return backend


def _wanted(backend: str | None) -> str | None:
    if backend is not None:
        return backend
    return _asked or os.environ.get("TOKENMILL_BACKEND") or None


def _interpreted(backend: str) -> bool:
    return backend == "emulated" or (backend == "triton" and _library.triton_interpreted())


_NAMESPACES = {"triton": _library.TRITON_NAMESPACE, "emulated": _library.EMULATED_NAMESPACE}


def namespace(backend: str) -> str:
    """The torch.ops namespace of a backend's kernels."""
    return _NAMESPACES.get(backend, _library.NAMESPACE)


ALL_RESULTS = 99


def call(
    spec: OpSpec,
    lowered: tuple[Any, ...],
    backend: str | None,
    out: torch.Tensor | None = None,
    used: int = ALL_RESULTS,
) -> tuple[Any, ...]:
    """Runs the lowered call on its backend; the first result is written into out. used: number of
    results that the caller uses; a plain call computes no others.
    """
    if backend is None and out is None and _asked is None and not compiling():
        op = spec.forward
        try:
            results = op.short(lowered, used) if op.short else NotImplemented
            if results is None:
                results = _call_and_record(op, lowered)
            elif op.written and results is not NotImplemented:
                note_writes(op, lowered)
        # reading strides costs as much as a check, so they are only read after a refusal
        except RuntimeError:
            if not strided(spec, lowered):
                raise
            results = NotImplemented
        if results is not NotImplemented:
            return results
    lowered = with_rows(spec, lowered, torch.Tensor.contiguous)
    if _autocast.enabled() and (device := _autocast.device_of(lowered)):
        if out is None:
            lowered = spec.forward.cast(lowered)
        with torch.autocast(device, enabled=False):
            return call(spec, lowered, backend, out)
    chosen = choose(spec, lowered, backend)
    if chosen == "reference" and _wanted(backend) is None and not compiling():
        _warn_of_missing_kernel(spec, lowered)
    sharding = sharding_of(lowered)
    checked, arguments = spec.forward, lowered
    if out is not None:
        assert spec.out is not None
        checked, arguments = spec.out, (*lowered, out)
    autograd = _needs_autograd(arguments)
    if autograd:
        refuse_gradient(checked, arguments)
    if chosen == "reference":
        if any(isinstance(t, torch.Tensor) and t.is_meta for t in lowered):
            # Shapes only: the reference checks values, and the operator has a fake kernel.
            checked.check(*arguments, float64=True)
            return _results(spec.forward.run(_library.NAMESPACE, lowered), out)
        if not torch.compiler.is_compiling():  # otherwise the dispatcher does so before a kernel
            lowered = checked.resolve_views(lowered)
            arguments = lowered if out is None else (*lowered, out)
        if sharding:
            with _mode_of_reference(spec, checked, arguments):
                return _results(sharding.run_reference(spec, lowered, checked, arguments), out)
        checked.check(*arguments, float64=True)
        spec.forward.check_values(*lowered)
        with _mode_of_reference(spec, checked, arguments):
            return _results(spec.reference(*lowered), out)
    if chosen != "cpu" and synchronising_checks() and not sharding:
        checked.check(*arguments)
        spec.forward.check_values(*lowered)
    if out is not None and not _has_out(spec, chosen):
        checked.check(*arguments)
        return _results(call(spec, lowered, chosen), out)
    if torch.compiler.is_compiling() or transformed():
        return _results(checked.run(namespace(chosen), arguments), None, out)
    # The dispatcher's autograd costs 10 us per call, as much as the rest of the dispatch.
    if autograd and (apply := checked.recorded(namespace(chosen))):
        return _results(apply(*arguments, None), None, out)
    results = below_autograd(checked, namespace(chosen), arguments)
    note_writes(checked, arguments)
    return _results(results, None, out)


_warned: set[tuple[str, str]] = set()


def _warn_of_missing_kernel(spec: OpSpec, lowered: tuple[Any, ...]) -> None:
    """Warns once per operator and device if its kernel was left out of the build."""
    first = next(t for t in lowered if isinstance(t, torch.Tensor))
    device = first.device.type
    missing = device in ("cpu", "cuda") and not spec.forward.has_native(device.upper())
    if missing and first.dtype != torch.float64 and (spec.name, device) not in _warned:
        _warned.add((spec.name, device))
        warnings.warn(
            f"tokenmill.{spec.name}: this build has no native {device.upper()} kernel of it, so "
            "the reference runs, in plain PyTorch and slowly (tokenmill.explain says why; a build "
            "without TOKENMILL_OPS has every kernel)",
            stacklevel=4,
        )


def _call_and_record(op: _library.TorchOp, values: tuple[Any, ...]) -> Any:
    """The results of a plain, differentiable call on the CPU; NotImplemented for any other call."""
    apply = op.recorded(_library.NAMESPACE)
    if apply is None or not values[0].is_cpu or values[0].dtype is torch.float64:
        return NotImplemented
    return _results(apply(*values, None), None)


def _mode_of_reference(
    spec: OpSpec, op: _library.TorchOp, arguments: tuple[Any, ...]
) -> contextlib.AbstractContextManager[Any]:
    """Matches the kernels: results without a gradient have none on the reference either, and
    arguments that kernels write may be inference tensors, which PyTorch only lets inference mode
    write.
    """
    if spec.differentiable and not op.written:
        return contextlib.nullcontext()
    written = [arguments[op.arguments.index(name)] for name in op.written]
    written = [t for t in written if t is not None]
    if not torch.compiler.is_compiling() and any(t.is_inference() for t in written):
        return torch.inference_mode()
    return torch.no_grad()


def _results(
    results: Any, copy_to: torch.Tensor | None, written: torch.Tensor | None = None
) -> tuple[Any, ...]:
    if results is None:
        results = ()
    results = results if isinstance(results, tuple) else (results,)
    if copy_to is not None:
        return copy_to.copy_(results[0]), *results[1:]
    return results if written is None else (written, *results)


def _has_out(spec: OpSpec, backend: str) -> bool:
    assert spec.out is not None
    if backend == "emulated":
        return spec.out.has_emulated()
    if backend == "triton":
        return spec.out.triton is not None
    return backend in ("cpu", "cuda") and spec.out.has_native(backend.upper())


def _needs_autograd(lowered: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for t in lowered:
            if isinstance(t, torch.Tensor) and t.requires_grad:
                return True
    return False


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
    from . import registry

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
        if out is None and _autocast.device_of(lowered):
            lowered = spec.forward.cast(lowered)
        spec.forward.check(*lowered, float64=True)
        if spec.out is not None and out is not None:
            spec.out.check(*lowered, spec.lower_out(out, *lowered), float64=True)
        chosen = choose(spec, lowered, backend)
    except RuntimeError as error:
        return Explanation(spec.name, None, None, {}, str(error))
    against = {}
    for name in BACKENDS:
        if name != chosen and (why := reasons(spec, name, lowered)):
            against[name] = why
        elif name != chosen:
            against[name] = [_passed_over(name, _wanted(backend))]
    kernel = kernel_name(spec, chosen, lowered, out)
    knobs = _knobs_of_call(spec, chosen, lowered, out)
    return Explanation(spec.name, chosen, kernel, against, knobs=knobs, copied=copied)


def _passed_over(name: str, asked: str | None) -> str:
    if asked:
        return "not asked for"
    if _interpreted(name):
        return "the interpreter runs only if asked for"
    return "comes later in the order of preference"


def kernel_name(
    spec: OpSpec, backend: str, lowered: tuple[Any, ...], out: torch.Tensor | None = None
) -> str:
    dtype = str(next(t for t in lowered if isinstance(t, torch.Tensor)).dtype)[6:]
    if backend == "cpu":
        return f"csrc/{spec.family}/{spec.name}, {_library.native.cpu_isa()}, {dtype}"
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
    if spec.unsupported_sm90_backward is None or not _needs_autograd(lowered):
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
    if backward is not None and _needs_autograd(lowered) and not backward(*lowered):
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
    built = any(key == "CUDA" for _, key in _library._native_keys)
    triton = _library.triton_installed()
    states = {
        "cpu": f"available ({_library.native.cpu_isa()})",
        "cuda": "available" if cuda and built else ("no GPU" if built else "not in this build"),
        "triton": (
            "not installed"
            if not triton
            else "available"
            if cuda
            else "no GPU (TRITON_INTERPRET=1 interprets)"
            if not _library.triton_interpreted()
            else _library.interpreter_fault() or "interpreter"
        ),
        "emulated": "interpreter",
        "reference": "available",
    }
    return {name: states[name] for name in BACKENDS}
