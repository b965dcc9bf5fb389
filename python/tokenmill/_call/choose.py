"""Backend selection."""

from __future__ import annotations

import os
from typing import Any

import torch

from .._check import InputError, fail
from . import library
from .spec import OpSpec

# In order of preference. "emulated" is the CUDA kernel in the PTX machine: it only runs on request.
ALL_BACKENDS = ("cpu", "cuda", "triton", "emulated", "reference")
BACKENDS = tuple(b for b in ALL_BACKENDS if b != "emulated" or library.emulated_built())
asked: str | None = None  # set by testing.emulated_cuda


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
        if not library.emulated_built():
            return ["not in this build (TOKENMILL_PTXVM=1)"]
        if device != "cpu":
            why.append(f"the tensors are on {device}")
        if not spec.forward.has_emulated():
            why.append("no native CUDA kernel in this build")
        return why + unsupported(spec, "cuda", lowered)
    else:
        if spec.forward.triton is None:
            why.append("the operator has no Triton kernel")
        elif not library.triton_installed():
            why.append("Triton is not installed (pip install tokenmill[triton])")
        elif device == "cpu" and not library.triton_interpreted():
            why.append("the tensors are on cpu (TRITON_INTERPRET=1 runs the kernel's interpreter)")
        elif device == "cpu" and (fault := library.interpreter_fault()):
            why.append(fault)
    return why + unsupported(spec, backend, lowered)


def unsupported(spec: OpSpec, backend: str, lowered: tuple[Any, ...]) -> list[str]:
    """The reasons why a backend's kernels do not support a call, wherever its tensors are."""
    return spec.unsupported(backend, spec.forward.record(*lowered)) if spec.unsupported else []


def choose(
    spec: OpSpec, lowered: tuple[Any, ...], backend: str | None = None, op: str | None = None
) -> str:
    """The backend that runs the call: the requested one (argument, testing.emulated_cuda, then
    TOKENMILL_BACKEND), or the first of BACKENDS that supports it. The reference always does;
    interpreters only run on request. Errors name op, or the operator itself.
    """
    op = op or spec.name
    backend = wanted(backend)
    if backend is None:
        for candidate in BACKENDS:
            if not interpreted(candidate) and not reasons(spec, candidate, lowered):
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


def wanted(backend: str | None) -> str | None:
    if backend is not None:
        return backend
    return asked or os.environ.get("TOKENMILL_BACKEND") or None


def interpreted(backend: str) -> bool:
    return backend == "emulated" or (backend == "triton" and library.triton_interpreted())


_NAMESPACES = {"triton": library.TRITON_NAMESPACE, "emulated": library.EMULATED_NAMESPACE}


def namespace(backend: str) -> str:
    """The torch.ops namespace of a backend's kernels."""
    return _NAMESPACES.get(backend, library.NAMESPACE)
