"""Loads the operator library and attaches to each operator its Python parts: fake kernels,
autograd, vmap, and Triton implementations.

`torch.ops.tokenmill.<op>` is the native operator. `torch.ops.tokenmill_triton.<op>` has the same
schema, fake, autograd and vmap, and runs the Triton kernel; where no native CUDA kernel is
registered it also serves `torch.ops.tokenmill.<op>` on CUDA. `torch.ops.tokenmill_emulated.<op>`,
only in development builds, runs the compiled CUDA kernel on CPU tensors, in the PTX machine. The
last two namespaces are filled at the first lookup of one of their operators.
"""

from __future__ import annotations

import collections
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import _derivatives, _door
from ._autocast import Autocast, device_of
from ._check import check_device_of, check_tensor
from ._lowering import scale_or_default

NAMESPACE = "tokenmill"
TRITON_NAMESPACE = "tokenmill_triton"
EMULATED_NAMESPACE = "tokenmill_emulated"


def find_ops(package: Path) -> Path:
    """The library of all operators in the package's folder."""
    ops, tree = package / "_ops.so", package.parents[1]
    if ops.exists():
        return ops
    rule = "the package was not built (pip install .)"
    if (tree / "CMakeLists.txt").exists():
        rule = (
            f"{tree} is a source tree without its build: pip install -e . builds into it; after "
            "pip install . run Python where it imports the installed package instead"
        )
    raise ImportError(f"tokenmill: {ops} is missing: {rule}")


_OPS = find_ops(Path(__file__).parent)
torch.ops.load_library(str(_OPS))
native: Any = getattr(torch.ops, NAMESPACE)
if _isa := os.environ.get("TOKENMILL_CPU_ISA"):
    native.cpu_isa(_isa)

_libraries = {NAMESPACE: torch.library.Library(NAMESPACE, "IMPL")}
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_AUTOCAST_KEYS |= torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


@functools.cache
def record_of(name: str) -> Any:
    """The arguments of an operator as a named tuple type, in the order of the schema."""
    schema = getattr(native, name).default._schema
    return collections.namedtuple(name, [a.name for a in schema.arguments])


_direct = {NAMESPACE: _door.functions(_OPS)}


@dataclass(frozen=True)
class TorchOp:
    """One operator of the library. Every callable takes the arguments of the schema.

    check raises for a bad call from metadata only (float64=True admits float64, which only the
    reference runs); check_values from the values inside tensors, which costs a synchronisation on a
    GPU. fake returns the outputs without data. triton is the "module:function" of the Triton
    implementation inside tokenmill.triton_kernels. backward and setup_context are as in
    torch.library.register_autograd, with torch.ops.<namespace> before the context. A call of an
    operator without backward has constant results, unless it refuses_gradients; an operator that
    writes into an argument always does. autocast declares what torch.autocast casts.
    """

    name: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    check_values: Callable[..., None] = lambda *args: None
    triton: str | None = None
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., Any] | None = None
    refuses_gradients: bool = False
    autocast: Autocast | None = None
    arguments: tuple[str, ...] = field(init=False)  # argument names of the schema
    positional: int = field(init=False)  # number of arguments that may be positional
    # defaults of the arguments, None where there is none
    defaults: tuple[Any, ...] = field(init=False)
    written: tuple[str, ...] = field(init=False)  # arguments that a call writes into
    tensors: frozenset[str] = field(init=False)  # arguments that must be tensors
    # The next two are created here, not at first use: a graph traced by Dynamo cannot create them.
    record: Any = field(init=False, compare=False, repr=False)  # the arguments as a named tuple
    # The operator's fast path in module _C for plain calls (_door.Door); None without one.
    short: Callable[[tuple[Any, ...], int], Any] | None = field(
        init=False, compare=False, repr=False
    )
    _recorded: dict[str, Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    @property
    def qualname(self) -> str:
        return f"{NAMESPACE}::{self.name}"

    def has_native(self, key: str) -> bool:
        """Whether a native kernel is registered for the dispatch key ("CPU" or "CUDA")."""
        return (self.name, key) in _native_keys

    def has_emulated(self) -> bool:
        """Whether this build can run the CUDA kernel in the PTX machine."""
        return self.name in _load_emulated()

    @property
    def public_name(self) -> str:
        """Name of the public operator that this operator belongs to."""
        return self.name.removesuffix("_backward").removesuffix("_out")

    @property
    def differentiates(self) -> TorchOp | None:
        """The operator whose gradients this one computes."""
        return _registered[self.public_name] if self.name.endswith("_backward") else None

    def __post_init__(self) -> None:
        schema = self.overload()._schema.arguments
        written = tuple(a.name for a in schema if a.alias_info and a.alias_info.is_write)
        object.__setattr__(self, "arguments", tuple(a.name for a in schema))
        object.__setattr__(self, "positional", sum(not a.kwarg_only for a in schema))
        object.__setattr__(self, "defaults", tuple(a.default_value for a in schema))
        object.__setattr__(self, "written", written)
        tensors = frozenset(a.name for a in schema if str(a.type) == "Tensor")
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "record", record_of(self.name))
        direct = _direct[NAMESPACE].get(self.name)
        object.__setattr__(self, "short", direct and direct.plain)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments of a torch.ops call, in the order of the schema; a scale of None becomes
        the default for the head_dim.
        """
        values = [*args, *self.defaults[len(args) :]]
        for name, value in kwargs.items():
            values[self.arguments.index(name)] = value
        if "scale" in self.arguments:
            q, at = values[self.arguments.index("q")], self.arguments.index("scale")
            if values[at] is None and isinstance(q, torch.Tensor):
                values[at] = scale_or_default(self.name, None, q)
        return tuple(values)

    def call(self, run: Callable[..., Any], values: Sequence[Any], *before: Any) -> Any:
        """run(*before, ...) with all arguments of a call, passed as torch.ops takes them."""
        named = dict(zip(self.arguments[self.positional :], values[self.positional :], strict=True))
        return run(*before, *values[: self.positional], **named)

    def needed_gradients(self, ctx: Any) -> dict[str, bool]:
        """The arguments for which the backward must return a gradient, by name."""
        return dict(zip(self.arguments, ctx.needs_input_grad, strict=False))

    def gradients(self, **of: Any) -> tuple[Any, ...]:
        """The return value of the operator's backward: the gradients given by name, else None."""
        return tuple(of.get(name) for name in self.arguments)

    def run(self, namespace: str, values: Sequence[Any]) -> Any:
        """torch.ops.<namespace>.<name> with all arguments of a call."""
        return self.call(self.overload(namespace), values)

    def resolve_views(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Materialises lazy negatives and conjugates, except in arguments that the call writes."""
        return tuple(
            value.resolve_neg().resolve_conj()
            if isinstance(value, torch.Tensor) and name not in self.written
            else value
            for name, value in zip(self.arguments, values, strict=False)
        )

    def direct(self, namespace: str) -> Callable[..., Any] | None:
        """The operator in module _C; None if this build has no native one."""
        if namespace == EMULATED_NAMESPACE:
            _load_emulated()
        found = _direct.get(namespace, {}).get(self.name)
        return found and found.call

    def run_direct(self, namespace: str, values: Sequence[Any]) -> Any:
        """The results of a call without the dispatcher, in torch.ops form, or NotImplemented."""
        run = self.direct(namespace)
        results = run(*values) if run and _door.is_open() else NotImplemented
        if results is NotImplemented or len(results) > 1:
            return results
        return results[0] if results else None

    def cast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a call after autocast."""
        if self.autocast is None:
            return args
        given = self.autocast.apply(dict(zip(self.arguments, args, strict=True)))
        return tuple(given.values())

    def overload(self, namespace: str = NAMESPACE) -> Any:
        return getattr(getattr(torch.ops, namespace), self.name).default

    def recorded(self, namespace: str) -> Callable[..., Any] | None:
        """Runs the operator below the dispatcher's autograd and records its derivative; None if it
        has none. It takes all arguments of a call, then the dispatch keys or None.
        """
        if namespace not in self._recorded:
            function: Any = _derivatives.autograd_function(self, namespace)
            self._recorded[namespace] = function and function.apply
        found: Callable[..., Any] | None = self._recorded[namespace]
        return found


_native_keys: set[tuple[str, str]] = set()
_registered: dict[str, TorchOp] = {}


def registered(name: str) -> TorchOp:
    return _registered[name]


def register(op: TorchOp) -> TorchOp:
    for key in ("CPU", "CUDA"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(op.qualname, key):
            _native_keys.add((op.name, key))
    _registered[op.name] = op
    _attach(op, NAMESPACE)
    if op.triton and not op.has_native("CUDA"):
        _libraries[NAMESPACE].impl(op.name, functools.partial(_call_triton, op), "CUDA")
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
    torch.library.register_torch_dispatch(qualname, cls, rule, lib=_libraries[namespace])


def _define_triton() -> None:
    library = torch.library.Library(TRITON_NAMESPACE, "DEF")
    _libraries[TRITON_NAMESPACE] = library
    for op in _registered.values():
        if op.triton:
            library.define(str(op.overload()._schema).removeprefix(f"{NAMESPACE}::"))
            for key in ("CPU", "CUDA"):  # CPU: for Triton's interpreter
                library.impl(op.name, functools.partial(_call_triton, op), key)
            _attach(op, TRITON_NAMESPACE)


def _attach(op: TorchOp, namespace: str) -> None:
    """Attaches fake kernel, autograd, vmap rule, autocast and, for operators that write into an
    argument, the handling of lazy negatives and conjugates in a namespace. torch's default handling
    of these fails an assertion and later aborts the process.
    """
    qualname = f"{namespace}::{op.name}"
    on_views = functools.partial(_call_on_views, op, namespace)
    for key in ("Conjugate", "Negative") if op.written else ():
        _libraries[namespace].impl(op.name, on_views, key)
    fake = functools.partial(call_fake, op)
    torch.library.register_fake(qualname, fake, lib=_libraries[namespace])
    autograd = _derivatives.autograd_kernel(op, namespace)
    _libraries[namespace].impl(op.name, autograd, "Autograd", with_keyset=True)
    vmap = _derivatives.vmap_kernel(op, namespace)
    _libraries[namespace].impl(op.name, vmap, "FuncTorchBatched", with_keyset=True)
    if op.autocast:
        for key in ("AutocastCPU", "AutocastCUDA"):
            kernel = functools.partial(_call_autocast, op, namespace)
            _libraries[namespace].impl(op.name, kernel, key)
    _attached.append((op, namespace))
    for cls, rule in _subclasses:
        _attach_rule(op, namespace, cls, rule(op, namespace))


def _call_autocast(op: TorchOp, namespace: str, *args: Any, **kwargs: Any) -> Any:
    values = op.bind(args, kwargs)
    if device_of(values):
        values = op.cast(values)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return op.run(namespace, values)


def _check(op: TorchOp, args: tuple[Any, ...], **options: bool) -> None:
    """torch passes None for any tensor: csrc/core/torch.cpp has the same check."""
    for name, value in zip(op.arguments, args, strict=True):
        if value is None and name in op.tensors:
            check_tensor(op.name, name, value)
    op.check(*args, **options)


def call_fake(op: TorchOp, *args: Any, **kwargs: Any) -> Any:
    values = op.bind(args, kwargs)
    if not _is_wide_on_meta(values):
        _check(op, values)
    elif not op.differentiates:
        _check(op, values, float64=True)
    # Also reached by a call with one tensor on meta; its results would be uninitialised memory.
    given = zip(op.arguments, values, strict=True)
    tensors = [(name, t) for name, t in given if isinstance(t, torch.Tensor)]
    first, anchor = tensors[0]
    for name, t in tensors[1:]:
        check_device_of(op.name, name, t, first, anchor)
    return op.fake(*values)


def _is_wide_on_meta(values: Sequence[Any]) -> bool:
    """Whether the call asks for the shapes of float64, which only the reference can run. (Within a
    graph tensors report the device that they will run on.)
    """
    first = values[0]
    if not isinstance(first, torch.Tensor):
        return False
    return first.dtype == torch.float64 and first.device.type == "meta"


def _call_on_views(op: TorchOp, namespace: str, *args: Any, **kwargs: Any) -> Any:
    values = op.resolve_views(op.bind(args, kwargs))
    _check(op, values)  # refuses written arguments
    return op.run(namespace, values)


def _call_triton(op: TorchOp, *args: Any, **kwargs: Any) -> Any:
    values = op.bind(args, kwargs)
    _check(op, values)
    assert op.triton
    module, function = op.triton.split(":")
    kernels = importlib.import_module(f"tokenmill.triton_kernels.{module}")
    return getattr(kernels, function)(*values)


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_installed() -> bool:
    return _TRITON_INSTALLED


def _minor_version(package: str) -> tuple[int, ...]:
    """(major, minor), or () for a package that is not installed."""
    try:
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _find_interpreter_fault() -> str | None:
    triton, numpy = (_minor_version(name) for name in ("triton", "numpy"))
    if not numpy:
        return "Triton's interpreter needs NumPy"
    # Triton 3.6 converts a 1-element array to int, which is an error from NumPy 2.4 on.
    if triton and triton < (3, 7) and numpy >= (2, 4):
        return "Triton's interpreter needs Triton 3.7 or later, or NumPy below 2.4"
    return None


_INTERPRETER_FAULT = _find_interpreter_fault() if _TRITON_INSTALLED else None


def interpreter_fault() -> str | None:
    """The reason why the interpreter of the installed Triton cannot run kernels, or None."""
    return _INTERPRETER_FAULT


EMULATED_PATH = Path(os.environ.get("TOKENMILL_EMULATED") or Path(__file__).parent / "_emulated.so")
_EMULATED_BUILT = EMULATED_PATH.exists()
_emulated_ops: set[str] = set()


def emulated_built() -> bool:
    return _EMULATED_BUILT


def _fill_emulated() -> None:
    from . import _knobs  # _knobs is above this module

    torch.ops.load_library(str(EMULATED_PATH))
    _direct[EMULATED_NAMESPACE] = _door.functions(EMULATED_PATH)
    _libraries[EMULATED_NAMESPACE] = torch.library.Library(EMULATED_NAMESPACE, "IMPL")
    found = []
    for op in _registered.values():
        qualname = f"{EMULATED_NAMESPACE}::{op.name}"
        if torch._C._dispatch_has_kernel_for_dispatch_key(qualname, "CPU"):
            found.append(op.name)
            _attach(op, EMULATED_NAMESPACE)
    _knobs.copy_to(getattr(torch.ops, EMULATED_NAMESPACE))
    _emulated_ops.update(found)  # atomic: another thread sees all of them or none


class _FilledAtFirstUse(torch._ops._OpNamespace):
    """A namespace of torch.ops filled at first use: its operators cost as much time as the rest of
    the import.
    """

    def __init__(self, name: str, fill: Callable[[], None]) -> None:
        super().__init__(name)
        self._fill: Callable[[], None] | None = fill
        self._filling = threading.RLock()
        setattr(torch.ops, name, self)

    def fill(self) -> None:
        with self._filling:
            fill, self._fill = self._fill, None  # fill looks operators up itself
            if fill:
                fill()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # attributes that Python reads of any module
            self.fill()
        return super().__getattr__(name)


_FilledAtFirstUse(TRITON_NAMESPACE, _define_triton)
_emulated = _FilledAtFirstUse(EMULATED_NAMESPACE, _fill_emulated) if emulated_built() else None


def loaded_emulated() -> Any:
    """The namespace of the emulated library, or None before its first use."""
    return _emulated if _emulated_ops else None


def _load_emulated() -> set[str]:
    """The operators of the emulated library. A trace also calls this, and can neither load it nor
    take a lock to see that it is loaded.
    """
    if _emulated and not _emulated_ops:
        _emulated.fill()
    return _emulated_ops
