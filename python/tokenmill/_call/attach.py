"""Attaches to each operator of a namespace its Python parts: fake kernel, autograd, vmap, autocast,
and Triton implementation.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from . import autograd, vmap
from .autocast import device_of
from .fake import call_fake
from .library import (
    EMULATED_NAMESPACE,
    NAMESPACE,
    TRITON_NAMESPACE,
    emulated_namespace,
    libraries,
    load_emulated,
    triton_namespace,
)
from .operator import TorchOp, add, all_registered

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_AUTOCAST_KEYS |= torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


def register(op: TorchOp) -> TorchOp:
    add(op)
    _attach(op, NAMESPACE)
    if op.triton and not op.has_native("CUDA"):
        libraries[NAMESPACE].impl(op.name, functools.partial(_call_triton, op), "CUDA")
    return op


_attached: list[tuple[TorchOp, str]] = []
_subclasses: list[tuple[type, Callable[[TorchOp, str], Callable[..., Any]]]] = []


def register_subclass(cls: type, rule: Callable[[TorchOp, str], Callable[..., Any]]) -> None:
    """Lets rule(op, namespace) handle calls of each operator, attached now or later, on tensors of
    a class with __torch_dispatch__. rule returns a function for
    torch.library.register_torch_dispatch.
    """
    _subclasses.append((cls, rule))
    for op, namespace in _attached:
        _attach_rule(op, namespace, cls, rule(op, namespace))


def _attach_rule(op: TorchOp, namespace: str, cls: type, rule: Callable[..., Any]) -> None:
    qualname = f"{namespace}::{op.name}"
    torch.library.register_torch_dispatch(qualname, cls, rule, lib=libraries[namespace])


def _attach(op: TorchOp, namespace: str) -> None:
    """Attaches fake kernel, autograd, vmap rule, autocast and, for operators that write into an
    argument, the handling of lazy negatives and conjugates in a namespace. torch's default handling
    of these fails an assertion and later aborts the process.
    """
    qualname = f"{namespace}::{op.name}"
    on_views = functools.partial(_call_on_views, op, namespace)
    for key in ("Conjugate", "Negative") if op.written else ():
        libraries[namespace].impl(op.name, on_views, key)
    fake = functools.partial(call_fake, op)
    torch.library.register_fake(qualname, fake, lib=libraries[namespace])
    recording = autograd.autograd_kernel(op, namespace)
    libraries[namespace].impl(op.name, recording, "Autograd", with_keyset=True)
    batched = vmap.vmap_kernel(op, namespace)
    libraries[namespace].impl(op.name, batched, "FuncTorchBatched", with_keyset=True)
    if op.autocast:
        for key in ("AutocastCPU", "AutocastCUDA"):
            kernel = functools.partial(_call_autocast, op, namespace)
            libraries[namespace].impl(op.name, kernel, key)
    _attached.append((op, namespace))
    for cls, rule in _subclasses:
        _attach_rule(op, namespace, cls, rule(op, namespace))


def _call_autocast(op: TorchOp, namespace: str, *args: Any, **kwargs: Any) -> Any:
    values = op.bind(args, kwargs)
    if device_of(values):
        values = op.cast(values)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return op.run(namespace, values)


def _call_on_views(op: TorchOp, namespace: str, *args: Any, **kwargs: Any) -> Any:
    values = op.resolve_views(op.bind(args, kwargs))
    op.check(*values)  # refuses written arguments
    return op.run(namespace, values)


def _call_triton(op: TorchOp, *args: Any, **kwargs: Any) -> Any:
    values = op.bind(args, kwargs)
    op.check(*values)
    assert op.triton
    module, function = op.triton.split(":")
    kernels = importlib.import_module(f"tokenmill.triton_kernels.{module}")
    return getattr(kernels, function)(op.record(*values))


def _define_triton() -> set[str]:
    library = torch.library.Library(TRITON_NAMESPACE, "DEF")
    libraries[TRITON_NAMESPACE] = library
    found = [op for op in all_registered() if op.triton]
    for op in found:
        library.define(str(op.overload()._schema).removeprefix(f"{NAMESPACE}::"))
        for key in ("CPU", "CUDA"):  # CPU: for Triton's interpreter
            library.impl(op.name, functools.partial(_call_triton, op), key)
        _attach(op, TRITON_NAMESPACE)
    return {op.name for op in found}


def _fill_emulated() -> set[str]:
    load_emulated()
    found = set()
    for op in all_registered():
        qualname = f"{EMULATED_NAMESPACE}::{op.name}"
        if torch._C._dispatch_has_kernel_for_dispatch_key(qualname, "CPU"):
            found.add(op.name)
            _attach(op, EMULATED_NAMESPACE)
    return found


triton_namespace.filler = _define_triton
if emulated_namespace is not None:
    emulated_namespace.filler = _fill_emulated
