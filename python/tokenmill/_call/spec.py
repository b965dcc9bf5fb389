"""What the package knows about one operator."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .operator import TorchOp


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of a public function. `make` draws fresh tensors from a generator.
    forward_only: this call has no gradient although the operator has.
    """

    name: str
    make: Callable[[torch.dtype, torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    forward_only: bool = False


AXES = {"b": "batch", "h": "heads", "r": "rows", "c": "channels"}


@dataclass(frozen=True)
class Sharding:
    """The dimensions along which a call splits into calls on parts of its arguments.

    A tensor has a letter of AXES for each dimension that may be split, and a point for the others:
    "b.h." for ``[B, S, H, D]``. Among labels separated by spaces a tensor takes the label of its
    rank, otherwise the trailing letters of the first. A suffix "~c": the tensor lacks this axis,
    and is the same for all parts of the call along it. The head axis may count KV heads, and a
    dimension of size 1 broadcasts.

    arguments: labels by name, or by several names separated by spaces (an integer that counts an
    axis has its letter); "name@other" applies to calls that have the argument `other`. Arguments
    not listed are the same for all parts. results: labels of each result. A gradient has the labels
    of its argument, a cotangent the labels of its result. Calls with an argument named in `without`
    cannot be split.
    """

    arguments: dict[str, str] = field(hash=False)
    results: tuple[str, ...]
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        each = {n: labels for names, labels in self.arguments.items() for n in names.split()}
        object.__setattr__(self, "arguments", each)

    @property
    def axes(self) -> list[str]:
        """Names of the axes along which some tensor may be split."""
        found = "".join((*self.arguments.values(), *self.results))
        return [word for letter, word in AXES.items() if letter in found]


@dataclass(frozen=True)
class OpSpec:
    """One public operator. Its name is its forward operator's, its family the folder of its
    reference, and backward and out are the operators registered under its name and their suffix.

    lower maps the arguments of the public function to the arguments of the schema, in its order; by
    default they are the same. sugar names the keywords that it converts, None if it converts more
    than these: it only checks a call without them.
    All other callables take the record of the call: these arguments by name.
    differentiable names the arguments with a gradient. out, if any, writes the first result into
    its last argument; lower_out(out, record) is this argument in the form of the schema.
    logarithms are the outputs (by position) whose errors are absolute while they are below 1: an
    absolute error of a logarithm is a relative error of its argument.
    flops counts the operations of a forward call, backward_flops the operations of its backward;
    None = twice as many. For tensors without data (meta and fake) they
    return bounds.
    unsupported(backend, record) lists the reasons why CUDA or Triton cannot run a call, beyond
    the rules for every operator. The cpu backend runs all calls.
    plain is ordinary PyTorch code in the dtype of the inputs, without care for precision: the
    baseline of the error budget; None = the reference.
    over_cache names the operator that runs calls of the public function with seqlens_k.
    sharding declares how a call on DTensors is split, or why it cannot be.
    copied names arguments that the public function copies if their last dimension is not
    contiguous; torch.ops refuses them.
    as_packed(q, k, v, kwargs) converts a call on jagged nested tensors to packed sequences.
    written names the arguments of the public function that some call writes into, if they differ
    from the schema's.
    samples come from the module <name>_cases next to the operator's, which only tests
    and tools load.
    """

    function: Callable[..., Any]
    reference: Callable[[Any], tuple[Any, ...]]
    forward: TorchOp
    paper: str
    flops: Callable[[Any], float]
    plain: Callable[[Any], tuple[Any, ...]] = None  # type: ignore[assignment]
    differentiable: tuple[str, ...] = ()
    backward_flops: Callable[[Any], float] | None = None
    lower: Callable[..., tuple[Any, ...]] = None  # type: ignore[assignment]
    sugar: frozenset[str] | None = None
    over_cache: str | None = None
    lower_out: Callable[[Any, Any], torch.Tensor] = field(default=lambda out, record: out)
    logarithms: tuple[int, ...] = ()
    unsupported: Callable[[str, Any], list[str]] | None = None
    sharding: Sharding | str | None = None
    written: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    as_packed: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None

    name: str = field(init=False)
    family: str = field(init=False)
    backward: TorchOp | None = field(init=False)
    out: TorchOp | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.forward.name)
        object.__setattr__(self, "family", self.reference.__module__.split(".")[2])
        object.__setattr__(self, "backward", self.forward.companion("_backward"))
        object.__setattr__(self, "out", self.forward.companion("_out"))
        object.__setattr__(self, "written", self.written or self.forward.written)
        if self.plain is None:
            object.__setattr__(self, "plain", self.reference)
        if self.lower is None:
            object.__setattr__(self, "lower", self.forward.lower)
            object.__setattr__(self, "sugar", frozenset())

    def record(self, *args: Any, **kwargs: Any) -> Any:
        """The record of a call of the public function."""
        return self.forward.record(*self.lower(*args, **kwargs))

    @functools.cached_property
    def samples(self) -> tuple[Sample, ...]:
        module = importlib.import_module(f"tokenmill.{self.family}.{self.name}_cases")
        found: tuple[Sample, ...] = module.SAMPLES
        return found

    def gradients_of(self, sample: Sample) -> tuple[str, ...]:
        """The arguments with a gradient in calls like the sample."""
        return () if sample.forward_only else self.differentiable

    @property
    def splits_along(self) -> str:
        """The axes along which calls on DTensors can be split, or the reason why there are none."""
        if isinstance(self.sharding, Sharding):
            return ", ".join(self.sharding.axes)
        return f"none: {self.sharding}" if self.sharding else "?"

    @property
    def torch_ops(self) -> Iterable[TorchOp]:
        return [op for op in (self.forward, self.backward) if op]
