"""What the package knows about each operator, written once: tests, benchmarks, documentation and
`python -m tokenmill` all read it here."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ._library import TorchOp


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of a public function. `make` draws fresh tensors from a generator.
    forward_only: an operator that has gradients has none of this call."""

    name: str
    make: Callable[[torch.dtype, torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    forward_only: bool = False


@dataclass(frozen=True)
class Malformed:
    """A call that every backend must refuse: `change` edits the arguments of a sample in place."""

    name: str
    error: str  # a piece of the message: argument, rule and value
    change: Callable[[list[Any], dict[str, Any]], None]
    values: bool = False  # breaks a rule on values inside tensors, not on metadata


AXES = {"b": "batch", "h": "heads", "r": "rows", "c": "channels"}


@dataclass(frozen=True)
class Sharding:
    """Along which dimensions a call falls apart into calls on parts of its arguments.

    A tensor has a letter of AXES for each dimension that may be split, and a point for others:
    "b.h." for ``[B, S, H, D]``. Of labels divided by a space a tensor takes those of its rank, or
    else the last ones of the first. "~c" behind them: the axis is not there, and the parts of the
    call along it have the same of it. Heads may be those of a group, and a dimension of size 1
    stands for all.

    arguments has the labels by name, or by several divided by spaces (a number that counts an axis
    has the letter); by "name@other" those in calls that have the argument `other`. What is not
    listed is the same for all parts. results has the labels of each result. Gradients have those of
    the argument, cotangents those of the result. Calls with an argument named in `without` do not
    fall apart.
    """

    arguments: dict[str, str] = field(hash=False)
    results: tuple[str, ...]
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        each = {n: labels for names, labels in self.arguments.items() for n in names.split()}
        object.__setattr__(self, "arguments", each)

    @property
    def axes(self) -> list[str]:
        """The words of the axes along which some tensor may be split."""
        found = "".join((*self.arguments.values(), *self.results))
        return [word for letter, word in AXES.items() if letter in found]


@dataclass(frozen=True)
class OpSpec:
    """One public operator.

    lower takes the arguments of the public function and returns the lowered list: the arguments of
    the schema, shared in one order by reference, C++ params and Triton launcher.
    differentiable names the arguments with a gradient. out, if there, is the operator that writes
    the first result into its last argument; lower_out(out, *lowered) is that argument as the schema
    has it.
    logarithms are the outputs (by position) whose errors count absolutely while they are below 1:
    an error there is a relative error of what they are the logarithm of.
    flops counts the operations of a forward call by the lowered list, backward_flops those of its
    backward; None = twice as many. Where tensors are shapes alone (meta and fake ones) they count
    bounds.
    unsupported(backend, *lowered) lists why CUDA or Triton cannot run a call, beyond what holds for
    every operator. The cpu backend runs all calls.
    unsupported_sm90(*lowered, out=out) lists why the kernel for compute capability 9.0 does not
    take a call, which the one for all chips then runs. None: there is no such kernel.
    sm90_kernel(*lowered) names the kernels of a call that it takes, if they are not
    csrc/<family>/<name>/kernel_sm90.
    sm90_knobs(*lowered, out=out) names the knobs that choose and cut them, if they are not those of
    the operator, or if one of them can keep a call from them by its size.
    unsupported_sm90_backward(*lowered) does so for the gradient of a call.
    plain is what PyTorch code without care for precision would do in the dtype of the inputs: the
    baseline of the error budget.
    over_cache names the operator that answers calls of the public function with seqlens_k.
    sharding says how a call on DTensors falls apart, or why it does not.
    copied names arguments that the public function copies if their last dimension is not
    contiguous; torch.ops refuses them.
    as_packed(q, k, v, kwargs) is a call of jagged nested tensors as one of packed sequences.
    written names the arguments of the public function that some call writes into, where they are
    not those of the schema.
    samples and malformed are those of the module <name>_cases beside that of the operator, which
    tests and tools alone load.
    """

    name: str
    family: str
    function: Callable[..., Any]
    lower: Callable[..., tuple[Any, ...]]
    reference: Callable[..., tuple[Any, ...]]
    plain: Callable[..., tuple[Any, ...]]
    forward: TorchOp
    backward: TorchOp | None
    differentiable: tuple[str, ...]
    paper: str
    flops: Callable[..., float]
    backward_flops: Callable[..., float] | None = None
    out: TorchOp | None = None
    over_cache: str | None = None
    lower_out: Callable[..., torch.Tensor] = field(default=lambda out, *lowered: out)
    logarithms: tuple[int, ...] = ()
    unsupported: Callable[..., list[str]] | None = None
    unsupported_sm90: Callable[..., list[str]] | None = None
    sm90_kernel: Callable[..., str] | None = None
    sm90_knobs: Callable[..., list[str]] | None = None
    unsupported_sm90_backward: Callable[..., list[str]] | None = None
    sharding: Sharding | str | None = None
    written: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    as_packed: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "written", self.written or self.forward.written)

    @functools.cached_property
    def samples(self) -> tuple[Sample, ...]:
        return self._cases().SAMPLES

    @functools.cached_property
    def malformed(self) -> tuple[Malformed, ...]:
        return self._cases().MALFORMED

    def gradients_of(self, sample: Sample) -> tuple[str, ...]:
        """The arguments with a gradient in calls like the sample."""
        return () if sample.forward_only else self.differentiable

    def _cases(self) -> Any:
        return importlib.import_module(f"{__package__}.{self.family}.{self.name}_cases")

    @property
    def splits_along(self) -> str:
        """The axes along which calls on DTensors fall apart, or why there are none."""
        if isinstance(self.sharding, Sharding):
            return ", ".join(self.sharding.axes)
        return f"none: {self.sharding}" if self.sharding else "?"

    @property
    def torch_ops(self) -> Iterable[TorchOp]:
        return [op for op in (self.forward, self.backward) if op]


_specs: dict[str, OpSpec] = {}


def register_op(spec: OpSpec) -> OpSpec:
    _specs[spec.name] = spec
    return spec


def ops() -> dict[str, OpSpec]:
    """All operators by name, sorted by family and name, whichever module was imported first."""
    return dict(sorted(_specs.items(), key=lambda entry: (entry[1].family, entry[0])))


class UnknownOperator(KeyError):
    """A name that no operator has."""

    def __str__(self) -> str:  # KeyError shows the repr of its message
        return str(self.args[0])


def get(name: str) -> OpSpec:
    if name not in _specs:
        raise UnknownOperator(
            f"tokenmill: no operator '{name}'{did_you_mean(str(name), _specs)}; "
            "tokenmill.registry.ops() has all"
        )
    return _specs[name]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """For a message: at most three names that are nearly this one or contain it, in parentheses
    after a space. Empty where there are none."""
    names = list(names)
    near = difflib.get_close_matches(name, names, 3, 0.7)
    if len(name) > 2:
        near += sorted((n for n in names if name in n), key=lambda n: (n.index(name), len(n)))
    quoted = [f"'{other}'" for other in dict.fromkeys(near)][:3]
    if not quoted:
        return ""
    listed = " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
    return f" (did you mean {listed}?)"
