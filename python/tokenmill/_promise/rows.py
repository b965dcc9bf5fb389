"""What the registry knows to ask of any operator: parts of a call by themselves, and strides.

`OpSpec.sharding` says which dimension of each argument counts the sequences of a batch, the heads,
rows or channels, so a sample of any operator can be cut into parts, and these put together in
another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import registry
from .._call.run import call
from .._invariance import difference
from ..registry import Sample, Sharding

PACKED = ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k")
DENSE = ("mask_", "state", "initial_")  # beginnings of arguments that must be contiguous

Found = dict[str, tuple[Tensor, int | None]]


class Parts:
    """A call of an operator, and the same call on parts of its arguments.

    op, sample, dtype, seed: the call. axis: the letter in `OpSpec.sharding` of what is cut.
    """

    def __init__(self, op: str, sample: Sample, axis: str, dtype: torch.dtype, seed: int) -> None:
        self.spec, self.axis, self.seed = registry.get(op), axis, seed
        labels = self.spec.sharding
        self.sharding = labels if isinstance(labels, Sharding) else Sharding({}, ())
        args, kwargs = sample.make(dtype, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            lowered = self.spec.lower(*args, **kwargs)
        self.given = dict(zip(self.spec.forward.arguments, lowered, strict=True))
        self.written = [n for n in self.spec.forward.written if isinstance(self.given[n], Tensor)]
        # The dimension of each argument that is cut. A dimension of size 1 is for all parts.
        at = {n: self._dim_of(n) for n, t in self.given.items() if isinstance(t, Tensor)}
        self.cut = {n: d for n, d in at.items() if d is not None and self.given[n].shape[d] > 1}
        sizes = (self.given[n].shape[d] for n, d in self.cut.items())
        self.count = 0 if self._whole() else math.gcd(*sizes)

    def _whole(self) -> bool:
        """Whether no part of the call stands for itself."""
        names = (*self.sharding.without, *(PACKED if self.axis == "b" else ()))
        ids = self.given.get("indices")  # tokens: [n] counts through the whole batch
        flat = self.spec.family == "tokens" and isinstance(ids, Tensor) and ids.dim() == 1
        given = (self.given.get(name) for name in names)
        return flat or any(isinstance(v, Tensor) or v for v in given)

    def _dim_of(self, name: str) -> int | None:
        labels = self.sharding.arguments
        text = labels.get(name, "")
        for key, other in labels.items():
            argument, _, condition = key.partition("@")
            if argument == name and condition and self.given.get(condition) is not None:
                text = other
        return self._dim(text, self.given[name].dim())

    def _dim(self, text: str, rank: int) -> int | None:
        labels = [part.partition("~")[0] for part in text.split()]
        if not labels:
            return None
        label = next((part for part in labels if len(part) == rank), labels[0])
        place = label[-rank:].find(self.axis) if rank else -1
        return None if place < 0 else place + max(0, rank - len(label))

    def _take(self, t: Tensor, at: int, order: Sequence[int]) -> Tensor:
        parts = t.tensor_split(self.count, at)
        return torch.cat([parts[i] for i in order], at)

    def run(
        self, order: Sequence[int] | None, backend: str, *, gradients: bool = False,
        shared: dict[str, Tensor] | None = None, move: Callable[[Tensor], Tensor] | None = None,
    ) -> Found:  # fmt: skip
        """Results, what the call wrote, and gradients, each with the dimension that is cut.

        order: the parts, in this order; None: the call as it is. shared: what arguments that the
        call writes and that all parts share hold, if not what the sample says. move: puts a tensor
        elsewhere in memory.
        """
        given = dict(self.given)
        for name, t in given.items():
            if order is not None and name in self.cut:
                given[name] = self._take(t, self.cut[name], order)
            elif name in self.written:
                given[name] = (shared or {}).get(name, t).clone()
            elif order is not None and name == "batch" and self.axis == "b":
                given[name] = len(order)
            if move and isinstance(given[name], Tensor) and not name.startswith(DENSE):
                given[name] = move(given[name])
        leaves = {}
        for name in self.spec.differentiable if gradients else ():
            if isinstance(t := given.get(name), Tensor) and t.is_floating_point():
                leaves[name] = given[name] = t.detach().requires_grad_()
        with torch.set_grad_enabled(gradients):
            results = call(self.spec, tuple(given.values()), None, backend)
        there = {i: r for i, r in enumerate(results) if r is not None and r.shape != (0,)}
        found: Found = {f"result {i}": (r.detach(), self._cut(i, r)) for i, r in there.items()}
        found |= {name: (given[name], self.cut.get(name)) for name in self.written}
        if gradients:
            found |= self._gradients(there, leaves, order)
        return found

    def _cut(self, i: int, r: Tensor) -> int | None:
        """The dimension of a result that is cut."""
        labels = self.sharding.results
        at = self._dim(labels[i], r.dim()) if i < len(labels) else None
        return None if at is None or r.shape[at] == 1 < self.count else at

    def _gradients(
        self, results: dict[int, Tensor], leaves: dict[str, Tensor], order: Sequence[int] | None
    ) -> Found:
        """Of what all parts share there is none: it is a sum over them."""
        g = torch.Generator().manual_seed(self.seed + 1)
        outs, weights = [], []
        for i, r in results.items():
            if not r.requires_grad:
                continue
            shape, at = list(r.shape), self._dim(self.sharding.results[i], r.dim())
            if at is None or order is None:
                weight = torch.randn(shape, generator=g)
            else:
                shape[at] = shape[at] // len(order) * self.count
                weight = self._take(torch.randn(shape, generator=g), at, order)
            outs.append(r)
            weights.append(weight.to(r))
        grads = torch.autograd.grad(outs, list(leaves.values()), weights, materialize_grads=True)
        both = zip(leaves, grads, strict=True)
        return {f"gradient of {n}": (t, self.cut[n]) for n, t in both if n in self.cut}


def compare_parts(parts: Parts, order: Sequence[int], backend: str, gradients: bool) -> str:
    """Where a call on parts, in some order and each any number of times, differs from calls on
    each part; "" if all bits agree.
    """
    together = parts.run(order, backend, gradients=gradients)
    shared: dict[str, Tensor] = {}
    for place, part in enumerate(order):
        alone = parts.run([part], backend, gradients=gradients, shared=shared)
        shared |= {n: alone[n][0] for n in parts.written if n not in parts.cut}
        for name, (x, at) in together.items():
            if at is None:
                continue
            if problem := difference(x.tensor_split(len(order), at)[place], alone[name][0]):
                return f"part {part} at {place} of {list(order)}: {name}{problem}"
    for name, y in shared.items():
        if problem := difference(together[name][0], y):
            return f"parts {list(order)}: {name}{problem}"
    return ""


def compare_strides(parts: Parts, backend: str) -> str:
    """Where the call on tensors with other strides differs; "" if all bits agree."""
    before, after = parts.run(None, backend), parts.run(None, backend, move=elsewhere)
    for name, (x, _) in before.items():
        if problem := difference(after[name][0], x):
            return f"{name}{problem}"
    return ""


def elsewhere(t: Tensor) -> Tensor:
    """The tensor as a part of a larger one: other strides, and a contiguous last dimension."""
    if t.numel() == 0 or t.dim() == 0:
        return t
    room = t.new_zeros([*t.shape[1:-1], *t.shape[:1], t.shape[-1] + 5][-max(t.dim(), 1) :])
    if t.dim() > 1:
        room = room.movedim(-2, 0)
    part = room[..., 3 : 3 + t.shape[-1]]
    return part.copy_(t)
