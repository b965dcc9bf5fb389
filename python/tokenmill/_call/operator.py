"""One operator of the library, by name: its schema, and the Python parts that a family declares."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._check import (
    InputError,
    as_int,
    as_number,
    check_bool,
    check_tensor,
    check_text,
    fail,
)
from .._lowering import scale_or_default
from . import door, rules
from .autocast import Autocast
from .library import EMULATED_NAMESPACE, NAMESPACE, doors, emulated_operators, native


@functools.cache
def record_of(name: str) -> Any:
    """The arguments of an operator as a named tuple type, in the order of the schema."""
    arguments = getattr(native, name).default._schema.arguments
    named: Any = collections.namedtuple  # mypy wants literal names
    return named(name, [a.name for a in arguments])


def as_record(name: str, record: Any, **given: Any) -> Any:
    """The record of operator `name` with the given arguments, the arguments that the record of
    another operator has under the same names, and the defaults of the schema.
    """
    fields = {a.name: a.default_value for a in getattr(native, name).default._schema.arguments}
    fields.update((n, value) for n, value in record._asdict().items() if n in fields)
    return record_of(name)(**fields | given)


# Types that need no conversion. An int may not fit 64 bits.
_EXACT = {
    "Tensor": torch.Tensor,
    "Optional[Tensor]": torch.Tensor,
    "float": float,
    "Optional[float]": float,
    "bool": bool,
    "str": str,
}
_STRIDED = torch.strided


@dataclass(frozen=True)
class TorchOp:
    """One operator of the library. Every callable takes its record: the arguments of the schema by
    name.

    check_values raises for bad values inside tensors, which costs a synchronisation on a GPU. fake
    returns the outputs without data; None: the public operator's outputs after the first, which the
    call writes. triton is the "module:function" of the Triton
    implementation inside tokenmill.triton_kernels. backward is as in
    torch.library.register_autograd, with torch.ops.<namespace> before the context; it returns
    gradients by name. saves names the results that it needs besides the arguments, constant those
    without a gradient; setup_context, with the arguments by name, replaces both. A call of an
    operator without backward has constant results, unless it refuses_gradients; an operator that
    writes into an argument always does. autocast declares what torch.autocast casts.
    """

    name: str
    fake: Callable[[Any], Any] = None  # type: ignore[assignment]
    check_values: Callable[[Any], None] = lambda record: None
    triton: str | None = None
    backward: Callable[..., Any] | None = None
    saves: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    setup_context: Callable[..., Any] | None = None
    refuses_gradients: bool = False
    autocast: Autocast | None = None
    arguments: tuple[str, ...] = field(init=False)  # argument names of the schema
    positional: int = field(init=False)  # number of arguments that may be positional
    # by name, in the order of the schema; None where there is none
    defaults: dict[str, Any] = field(init=False, compare=False, repr=False)
    written: tuple[str, ...] = field(init=False)  # arguments that a call writes into
    kinds: tuple[str, ...] = field(init=False)  # "Tensor", "int", "float", "bool" or "str"
    tensors: frozenset[str] = field(init=False)  # arguments that must be tensors
    results: tuple[str, ...] = field(init=False)  # names of the results in the schema
    optional: frozenset[str] = field(init=False)  # arguments that may be None
    exact: dict[str, Any] = field(init=False, compare=False, repr=False)  # by name, see _EXACT
    # The next two are created here: a graph traced by Dynamo cannot create them.
    record: Any = field(init=False, compare=False, repr=False)  # the arguments as a named tuple
    # The operator's fast path in module _C for plain calls (door.Door); None without one.
    short: Callable[..., Any] | None = field(init=False, compare=False, repr=False)

    @property
    def qualname(self) -> str:
        return f"{NAMESPACE}::{self.name}"

    def has_native(self, key: str) -> bool:
        """Whether a native kernel is registered for the dispatch key ("CPU" or "CUDA")."""
        return (self.name, key) in native_keys

    def has_emulated(self) -> bool:
        """Whether this build can run the CUDA kernel in the PTX machine."""
        return self.name in emulated_operators()

    @property
    def public_name(self) -> str:
        """Name of the public operator that this operator belongs to."""
        return self.name.removesuffix("_backward").removesuffix("_out")

    def companion(self, suffix: str) -> TorchOp | None:
        """The operator registered under this name and a suffix, "_backward" or "_out"."""
        return _registered.get(self.name + suffix)

    @property
    def differentiates(self) -> TorchOp | None:
        """The operator whose gradients this one computes."""
        return _registered[self.public_name] if self.name.endswith("_backward") else None

    def __post_init__(self) -> None:
        if self.fake is None:
            object.__setattr__(self, "fake", functools.partial(_fake_rest, self.public_name))
        schema = self.overload()._schema.arguments
        results = tuple(r.name for r in self.overload()._schema.returns)
        object.__setattr__(self, "results", results)
        written = tuple(a.name for a in schema if a.alias_info and a.alias_info.is_write)
        object.__setattr__(self, "arguments", tuple(a.name for a in schema))
        object.__setattr__(self, "positional", sum(not a.kwarg_only for a in schema))
        object.__setattr__(self, "defaults", {a.name: a.default_value for a in schema})
        object.__setattr__(self, "written", written)
        kinds = tuple(str(a.type).removeprefix("Optional[").removesuffix("]") for a in schema)
        object.__setattr__(self, "kinds", kinds)
        tensors = frozenset(a.name for a in schema if str(a.type) == "Tensor")
        object.__setattr__(self, "tensors", tensors)
        optional = frozenset(a.name for a in schema if str(a.type).startswith("Optional["))
        object.__setattr__(self, "optional", optional)
        object.__setattr__(self, "record", record_of(self.name))
        object.__setattr__(self, "exact", {a.name: _EXACT.get(str(a.type)) for a in schema})
        direct = doors[NAMESPACE].get(self.name)
        object.__setattr__(self, "short", direct and direct.plain)

    def check(self, *values: Any, float64: bool = False, op: str | None = None) -> None:
        """Raises if metadata of the arguments breaks a rule (rules.broken_rule). float64 admits
        this dtype, which only the reference runs. Errors name op, or the public operator. Within a
        trace of Dynamo the operator's fake kernel checks: a call of the reference has it called on
        the meta device, whose results nothing uses.
        """
        if torch.compiler.is_dynamo_compiling():
            if float64:
                tensors = (isinstance(value, torch.Tensor) for value in values)
                pairs = zip(tensors, values, strict=True)
                self.run(NAMESPACE, [t.detach().to("meta") if known else t for known, t in pairs])
            return
        for name, value in zip(self.arguments, values, strict=True):
            if value is None and name in self.tensors:  # torch passes None for any tensor
                check_tensor(op or self.name, name, value)
        message = rules.broken_rule(self.name, self.kinds, values, float64=float64)
        if message is not None:
            here = f"tokenmill.{self.public_name}:"
            raise InputError(message.replace(here, f"tokenmill.{op}:", 1) if op else message)
        for name in self.written:
            t = values[self.arguments.index(name)]
            if t is not None and (t.is_neg() or t.is_conj()):
                rule = "must not be a negative or conjugate view"
                fail(op or self.public_name, name.removesuffix("_out"), rule, t)

    def fields(self, op: str | None = None, /, **given: Any) -> dict[str, Any]:
        """All arguments by name, in the order of the schema: the given ones, whose kinds it checks,
        and defaults. Errors name op, or the operator itself.
        """
        return self.defaults | self.of_kind(given, op)

    def of_kind(self, given: dict[str, Any], op: str | None = None) -> dict[str, Any]:
        """The given arguments, converted to the kinds of the schema."""
        exact = self.exact
        for name, value in given.items():
            kind = type(value)
            if kind is not exact[name] or (kind is torch.Tensor and value.layout is not _STRIDED):
                given[name] = self._as_kind(op or self.name, name, value)
        return given

    def lower(self, *args: Any, **given: Any) -> tuple[Any, ...]:
        """All arguments of a call, in the order of the schema; checks the kinds of given ones."""
        return tuple(self.fields(**self.named(args, given)).values())

    def named(self, values: Sequence[Any], given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name: values are the first ones of the schema."""
        return {**dict(zip(self.arguments, values, strict=False)), **given}

    def _as_kind(self, op: str, name: str, value: Any) -> Any:
        kind, optional = self.kinds[self.arguments.index(name)], name in self.optional
        if kind == "Tensor":
            check_tensor(op, name, value, optional=optional)
        elif value is None and optional:
            return None
        elif kind == "str":
            check_text(op, name, value)
        elif kind == "bool":
            check_bool(op, name, value)
        elif kind == "float":
            return as_number(op, name, value)
        else:
            return as_int(op, name, value, "must be an integer" + " or None" * optional)
        return value

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments of a torch.ops call, in the order of the schema; a scale of None becomes
        the default for the head_dim.
        """
        fields = self.defaults | self.named(args, kwargs)
        if "scale" in fields and fields["scale"] is None and isinstance(fields["q"], torch.Tensor):
            fields["scale"] = scale_or_default(self.name, None, fields["q"])
        return tuple(fields.values())

    def call(self, run: Callable[..., Any], values: Sequence[Any], *before: Any) -> Any:
        """run(*before, ...) with all arguments of a call, passed as torch.ops takes them."""
        named = dict(zip(self.arguments[self.positional :], values[self.positional :], strict=True))
        return run(*before, *values[: self.positional], **named)

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
            emulated_operators()
        found = doors.get(namespace, {}).get(self.name)
        return found and found.call

    def run_direct(self, namespace: str, values: Sequence[Any]) -> Any:
        """The results of a call without the dispatcher, or NotImplemented."""
        run = self.direct(namespace)
        return run(*values) if run and door.is_open() else NotImplemented

    def cast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a call after autocast."""
        if self.autocast is None:
            return args
        return tuple(self.autocast.apply(self.named(args, {})).values())

    def overload(self, namespace: str = NAMESPACE) -> Any:
        return getattr(getattr(torch.ops, namespace), self.name).default


native_keys: set[tuple[str, str]] = set()
_registered: dict[str, TorchOp] = {}


def add(op: TorchOp) -> None:
    for key in ("CPU", "CUDA"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(op.qualname, key):
            native_keys.add((op.name, key))
    _registered[op.name] = op


def _fake_rest(name: str, record: Any) -> Any:
    """The fake results of operator `name` but the first."""
    results = _registered[name].fake(record)
    rest = results[1:] if isinstance(results, tuple) else ()
    return rest if len(rest) > 1 else rest[0] if rest else None


def registered(name: str) -> TorchOp:
    return _registered[name]


def all_registered() -> list[TorchOp]:
    return list(_registered.values())
