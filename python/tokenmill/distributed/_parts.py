"""Splits a call on DTensors into calls on their shards, from metadata only: the same answer, or the
same error, on every rank.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.utils._python_dispatch import _disable_current_modes

from .. import registry
from .._call import fake, operator
from .._call.operator import TorchOp
from .._call.spec import AXES, Sharding
from .._check import fail


class Meta(NamedTuple):
    """Metadata of a tensor. A plain tensor is the same on every rank."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...]


class Slice(NamedTuple):
    """Slice of a dimension that a rank takes from a tensor replicated in its group of ranks."""

    dim: int
    start: int
    size: int  # size of the dimension


@dataclass(frozen=True)
class Part:
    """The part of a tensor on a rank: its shard at these placements, then these slices.

    once: the call is split along an axis that the tensor lacks, and another rank already counts it.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    placements: tuple[Placement, ...]
    slices: tuple[Slice, ...] = ()
    once: bool = False


@dataclass(frozen=True)
class Plan:
    """Plan of a call: a Part, a number or None for each argument, and a Part for each result."""

    arguments: tuple[Any, ...]
    results: tuple[Part, ...]
    # placements of the gradients of the arguments
    gradients: tuple[tuple[Placement, ...] | None, ...]


@dataclass(frozen=True)
class Axes:
    """The axes of a tensor by dimension ("." for none), and the axes that it may lack."""

    letters: str
    same: str

    def dim(self, axis: str | None) -> int | None:
        at = self.letters.find(axis) if axis else -1
        return None if at < 0 else at


def parse(labels: str, rank: int) -> Axes:
    options = [label.partition("~") for label in labels.split()] or [("", "", "")]
    letters, _, same = next((o for o in options if len(o[0]) == rank), options[0])
    padded = letters.rjust(rank, ".")
    return Axes(padded[len(padded) - rank :], same)


@dataclass(frozen=True)
class _Labels:
    """Axis labels of a forward or backward operator."""

    arguments: dict[str, str]
    results: tuple[str, ...]  # of gradients the names of their arguments
    saved: frozenset[str]  # arguments that are results of the forward
    cotangents: frozenset[str]
    gradients: bool  # whether the results are gradients
    without: tuple[str, ...]

    def of(self, name: str, given: dict[str, Any]) -> str:
        for key, labels in self.arguments.items():
            own, at, other = key.partition("@")
            if own == name and at and given.get(other) is not None:
                return labels
        return self.arguments.get(name, "")


@functools.cache
def labels_of(name: str) -> _Labels:
    """Raises KeyError for a result or a gradient without a known name."""
    op = operator.registered(name)
    forward = operator.registered(op.public_name)
    sharding = registry.get(op.public_name).sharding
    if not isinstance(sharding, Sharding):
        names = tuple("" for _ in op.overload()._schema.returns)
        return _Labels({}, names, frozenset(), frozenset(), False, ())
    results = dict(zip(_result_names(forward, "out"), sharding.results, strict=True))
    arguments = dict(sharding.arguments)
    saved, cotangents = set(), set()
    for name in op.arguments:
        if name in forward.arguments:
            continue
        if name in results:
            arguments[name] = results[name]
            saved.add(name)
        elif name.removeprefix("d") in results:
            arguments[name] = results[name.removeprefix("d")]
            cotangents.add(name)
    own = _result_names(op, f"d{forward.arguments[0]}" if op.differentiates else "out")
    if op.differentiates:
        found = tuple(name.removeprefix("d") for name in own)
        if not {*found} <= {*sharding.arguments}:
            raise KeyError(found)
    else:
        found = tuple(results[name] for name in own)
    return _Labels(
        arguments,
        found,
        frozenset(saved),
        frozenset(cotangents),
        op.differentiates is not None,
        sharding.without,
    )


def _result_names(op: TorchOp, unnamed: str) -> list[str]:
    return [r.name or unnamed for r in op.overload()._schema.returns]


def plan(op: TorchOp, mesh: DeviceMesh, values: tuple[Any, ...]) -> Plan:
    """values: arguments of the schema, with a Meta for each tensor."""
    ranks = tuple(mesh.get_coordinate() or ())
    try:
        hash(values)
    except TypeError:  # symbolic sizes
        return _Planner(op, mesh, ranks, values).plan()
    return _remembered(op.name, mesh, ranks, values)


@functools.lru_cache(maxsize=4096)
def _remembered(
    name: str, mesh: DeviceMesh, ranks: tuple[int, ...], values: tuple[Any, ...]
) -> Plan:
    return _Planner(operator.registered(name), mesh, ranks, values).plan()


class _Planner:
    def __init__(
        self, op: TorchOp, mesh: DeviceMesh, ranks: tuple[int, ...], values: tuple[Any, ...]
    ) -> None:
        self.op, self.mesh, self.ranks = op, mesh, ranks
        self.given = dict(zip(op.arguments, values, strict=True))
        self.labels = labels_of(op.name)
        self.tensors = {name: v for name, v in self.given.items() if isinstance(v, Meta)}
        self.axes = {
            name: parse(self._labels_of(name, t), len(t.shape)) for name, t in self.tensors.items()
        }
        self.results = _global_results(op, values)
        found = self.labels.results
        if self.labels.gradients:
            found = tuple(self.labels.of(name, self.given) for name in found)
        self.result_axes = [
            parse(labels, r.dim()) for labels, r in zip(found, self.results, strict=True)
        ]
        self.chosen: list[str | None] = []

    def plan(self) -> Plan:
        for i in range(self.mesh.ndim):
            self.chosen.append(self._axis(i))
        return Plan(
            tuple(self._argument(name, value) for name, value in self.given.items()),
            tuple(self._result(r, a) for r, a in zip(self.results, self.result_axes, strict=True)),
            tuple(self._gradient(name) for name in self.given),
        )

    def _labels_of(self, name: str, t: Meta) -> str:
        stands_for_none = t.shape == (0,) and name in self.labels.saved
        return "" if stands_for_none else self.labels.of(name, self.given)

    # Choice of the axis that each mesh dimension splits.

    def _axis(self, i: int) -> str | None:
        first = next(self._split(i), None)
        if first is None:
            for name in self.op.written:
                if name in self.tensors and not self._at(name, i).is_replicate():
                    self._fail(name, "must be Shard or Replicate, as it is written", i)
            return None
        axis = self._letter(first, i)
        self._check_call(axis, first, i)
        for name in self.tensors:
            if name not in self.labels.cotangents:
                self._check_placement(axis, first, name, i)
        self._check_sizes(axis, first, i)
        return axis

    def _split(self, i: int) -> Iterator[str]:
        """Arguments split by the mesh dimension. Cotangents are skipped: autograd passes any
        placement, and they are redistributed to match.
        """
        for name in self.tensors:
            placement = self._at(name, i)
            if name in self.labels.cotangents or placement.is_replicate():
                continue
            if not placement.is_partial():
                yield name

    def _letter(self, name: str, i: int) -> str:
        placement, axes = self._at(name, i), self.axes[name]
        letter = axes.letters[placement.dim] if type(placement) is Shard else "."
        if letter == ".":
            dims = [f"{d} ({AXES[x]})" for d, x in enumerate(axes.letters) if x != "."]
            why = f"must be split only along dimension {' or '.join(dims)}"
            self._fail(name, why if dims else "must be the same on every rank", i)
        return letter

    def _check_call(self, axis: str, first: str, i: int) -> None:
        """Checks that the call can be split along the axis."""
        word = AXES[axis]
        for name in self.labels.without:
            if self.given.get(name):
                rule = f"must not be given where the call is split along {word}"
                fail(self.op.public_name, name, rule, self.given[name])
        anchor = operator.registered(self.op.public_name).arguments[0]
        parts = [self.axes[anchor]]
        if not self.labels.gradients:
            found = zip(self.results, self.result_axes, strict=True)
            parts += [axes for r, axes in found if r.shape != (0,)]
        if not all(axis in part.letters + part.same for part in parts):
            self._fail(first, f"must not be split along {word} in this call", i)

    def _check_placement(self, axis: str, first: str, name: str, i: int) -> None:
        placement, dim = self._at(name, i), self.axes[name].dim(axis)
        if placement.is_replicate() or placement.is_partial():
            if name in self.op.written:  # otherwise the call would write into a copy
                where = "the same on every rank" if dim is None else f"Shard({dim})"
                rule = f"must be {where}, as it is written and {first} is split along {AXES[axis]}"
                if dim is None:
                    rule = f"must be split as {first} is, along {AXES[axis]}, as it is written"
                self._fail(name, rule, i)
        elif type(placement) is not Shard or placement.dim != dim:
            where = "Replicate" if dim is None else f"Shard({dim}) or Replicate"
            self._fail(name, f"must be {where}, as {first} is split along {AXES[axis]}", i)

    def _check_sizes(self, axis: str, first: str, i: int) -> None:
        ways = self._ways(axis, i)
        uniform, largest = self._uniform(axis), self._largest(axis)
        misfits = [
            (name, size)
            for name, size, fixed in self._sizes(axis)
            if not _fits(size, ways, uniform and size == largest, fixed)
        ]
        if misfits:
            # a result would combine values along the split axis
            if any(not name for name, _ in misfits):
                self._fail(first, f"must not be split along {AXES[axis]} in this call", i)
            name, size = misfits[0]
            rule = f"must have {AXES[axis]} that {math.prod(ways)} ranks share evenly"
            fail(self.op.public_name, name, rule, size)

    def _ways(self, axis: str, until: int) -> list[int]:
        """Numbers of ranks by which successive mesh dimensions split the axis."""
        before = [self.mesh.size(j) for j in range(until) if self.chosen[j] == axis]
        return [*before, self.mesh.size(until)]

    def _sizes(self, axis: str) -> Iterator[tuple[str, int, bool]]:
        """Name of the argument or "", size along the axis, whether it must be split completely."""
        for name, t in self.tensors.items():
            dim = self.axes[name].dim(axis)
            if dim is not None:
                split = any(type(p) is Shard and p.dim == dim for p in t.placements)
                yield name, t.shape[dim], split or name in self.op.written
        for r, axes in zip(self.results, self.result_axes, strict=True):
            dim = axes.dim(axis)
            if dim is not None and r.shape != (0,):
                yield "", r.shape[dim], not self.labels.gradients

    def _largest(self, axis: str) -> int:
        return max(size for _, size, _ in self._sizes(axis))

    def _uniform(self, axis: str) -> bool:
        """Whether all split sizes are equal, so that uneven shards are possible too."""
        largest = self._largest(axis)
        return all(n == largest or (n == 1 and not fixed) for _, n, fixed in self._sizes(axis))

    # The parts on this rank.

    def _argument(self, name: str, value: Any) -> Any:
        if isinstance(value, Meta):
            once = name in self.labels.cotangents and self._counted_elsewhere(self.axes[name])
            placements, slices = self._place(value.shape, self.axes[name], Replicate())
            return Part(value.shape, value.stride, placements, slices, once)
        axis = self.labels.arguments.get(name, "")
        if value is None or axis not in AXES:
            return value
        for i, chosen in enumerate(self.chosen):
            if chosen == axis:
                value = _chunk(value, self.mesh.size(i), self.ranks[i])
        return value

    def _result(self, r: Tensor, axes: Axes) -> Part:
        other: Placement = Partial() if self.labels.gradients else Replicate()
        if r.shape == (0,):  # stands for no result
            return Part((0,), (1,), (Replicate(),) * self.mesh.ndim)
        placements, slices = self._place(tuple(r.shape), axes, other)
        once = not self.labels.gradients and self._counted_elsewhere(axes)
        return Part(tuple(r.shape), r.stride(), placements, slices, once)

    def _gradient(self, name: str) -> tuple[Placement, ...] | None:
        if name not in self.tensors:
            return None
        return self._place(self.tensors[name].shape, self.axes[name], Partial())[0]

    def _counted_elsewhere(self, axes: Axes) -> bool:
        lacking = [i for i, a in enumerate(self.chosen) if a and axes.dim(a) is None]
        return any(self.ranks[i] > 0 for i in lacking)

    def _place(
        self, shape: Sequence[int], axes: Axes, other: Placement
    ) -> tuple[tuple[Placement, ...], tuple[Slice, ...]]:
        """Placement for each mesh dimension, `other` where several parts of the call share the
        tensor; and the slices of shared tensors.
        """
        placements: list[Placement] = []
        slices: list[Slice] = []
        left = list(shape)
        for i, axis in enumerate(self.chosen):
            dim = axes.dim(axis)
            ways = self.mesh.size(i)
            if axis is None:
                placements.append(Replicate())
            elif dim is None:
                placements.append(other)
            elif (self._uniform(axis) and shape[dim] == self._largest(axis)) or (
                left[dim] % ways == 0
            ):
                placements.append(Shard(dim))
                left[dim] = -(-left[dim] // ways)
            else:
                placements.append(other)
                if left[dim] > 1:
                    at = self.ranks[i] * left[dim] // ways
                    slices.append(Slice(dim, at, left[dim]))
                left[dim] = 1
        return tuple(placements), tuple(slices)

    def _at(self, name: str, i: int) -> Placement:
        return self.tensors[name].placements[i]

    def _fail(self, name: str, rule: str, i: int) -> None:
        if self.mesh.ndim > 1:
            rule += f" (mesh dimension {i})"
        fail(self.op.public_name, name, rule, self._at(name, i))


def _fits(size: int, ways: list[int], uniform: bool, fixed: bool) -> bool:
    if uniform:
        return True
    for n in ways:
        if size % n == 0:
            size //= n
        elif fixed or n % size:
            return False
        else:
            size = 1
    return True


def _chunk(size: int, ways: int, rank: int) -> int:
    """Size of a rank's chunk, as in torch.chunk."""
    maximum = -(-size // ways)
    return max(min(maximum, size - maximum * rank), 0)


def _global_results(op: TorchOp, values: tuple[Any, ...]) -> list[Tensor]:
    """The results of the whole call without data; raises for a call that breaks a rule."""
    sizes = [n for v in values if isinstance(v, Meta) for n in v.shape]
    # products of symbolic sizes belong to the graph
    traced = any(isinstance(n, torch.SymInt) for n in sizes)
    with contextlib.nullcontext() if traced else _disable_current_modes():
        whole = [
            torch.empty_strided(v.shape, v.stride, dtype=v.dtype, device="meta")
            if isinstance(v, Meta)
            else v
            for v in values
        ]
        results = fake.call_fake(op, *whole)
    if results is None:
        return []
    return [results] if isinstance(results, Tensor) else list(results)
