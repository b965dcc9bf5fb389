"""The ranks that share a sequence, and what they send each other.

Two collectives carry everything: `exchange` (every rank sends a part of its elements to every
other) and `gather` (every rank gets the shards of all). Both take shards of different sizes, are
differentiable, and sum gradients in the order of the ranks, so that results have the same bits on
every run. They are PyTorch's functional collectives: a result is waited for where it is first used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._check import check, fail, synchronising_checks

# torch 2.13 renames it.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor


class PeerError(RuntimeError):
    """A collective that did not end: a rank is gone, late or at another call."""


class Group:
    """The ranks of a process group, or of a device mesh of one dimension, in one call."""

    def __init__(self, op: str, mesh: DeviceMesh | None, group: dist.ProcessGroup | None) -> None:
        self.op = op
        if not dist.is_available() or not dist.is_initialized():
            fail(op, "group", "needs torch.distributed.init_process_group", None)
        if mesh is not None:
            ok = isinstance(mesh, DeviceMesh)
            check(ok, op, "mesh", "must be a torch.distributed.device_mesh.DeviceMesh", mesh)
            check(group is None, op, "group", "must be None beside mesh", group)
            check(mesh.ndim == 1, op, "mesh", "must have one dimension", mesh.ndim)
            group = mesh.get_group()
        elif group is None:
            group = dist.group.WORLD
        ok = isinstance(group, dist.ProcessGroup)
        check(ok, op, "group", "must be a torch.distributed.ProcessGroup this rank is in", group)
        assert group is not None
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.name = f"group '{group.group_name}'"

    @contextlib.contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Names operator, rank and group where a collective fails."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if isinstance(error, PeerError):
                raise
            where = f"rank {self.rank} of {self.size} in group '{self.group.group_name}'"
            cause = " ".join(str(error).split())
            raise PeerError(
                f"tokenmill.{self.op}: group: {where}: {what} failed; got {cause}"
            ) from error

    def send(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """`sent[r]` elements of the flat x go to rank r, and `received[r]` come from it."""
        with self.named("all_to_all"):
            return funcol.all_to_all_single(x.contiguous(), [*received], [*sent], self.group)

    def wait(self, x: Tensor) -> Tensor:
        with self.named("a collective"):
            return funcol.wait_tensor(x)

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """send(), with its gradient."""
        if self.size == 1:
            return x
        found: Tensor = _Exchange.apply(x, self, tuple(sent), tuple(received))
        return found

    def gather(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """The shards of all ranks, joined along dim; rank r has sizes[r] of it."""
        if self.size == 1:
            return x
        found: Tensor = _Gather.apply(x, self, dim, tuple(sizes))
        return found

    def check_alike(self, **values: Any) -> None:
        """Compares what all ranks must have in common, where TOKENMILL_CHECK=1 asks for it."""
        if self.size == 1 or not synchronising_checks():
            return
        found: list[Any] = [None] * self.size
        with self.named("the comparison of arguments"):
            dist.all_gather_object(found, values, group=self.group)
        for rank, other in enumerate(found):
            for name, value in values.items():
                same = other.get(name) == value
                rule = f"must be that of rank {rank} in {self.name}, {other.get(name)}"
                check(same, self.op, name, rule, value)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> Tensor:
        ctx.how = group, sent, received
        return group.wait(group.send(x, sent, received))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        group, sent, received = ctx.how
        return group.wait(group.send(g, received, sent)), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.how = group, dim, sizes
        rows = x.movedim(dim, 0)
        most = max(sizes)
        if rows.shape[0] < most:  # a collective takes shards of one size
            rows = torch.cat([rows, rows.new_zeros(most - rows.shape[0], *rows.shape[1:])])
        with group.named("all_gather"):
            found = funcol.wait_tensor(_all_gather(rows.contiguous(), 0, group.group))
        if min(sizes) < most:
            parts = zip(found.split(most), sizes, strict=True)
            found = torch.cat([part[:size] for part, size in parts])
        return found.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        group, dim, sizes = ctx.how
        rows = g.movedim(dim, 0).contiguous()
        each = rows.shape[1:].numel()
        own = sizes[group.rank]
        sent = [size * each for size in sizes]
        parts = group.wait(group.send(rows.flatten(), sent, [own * each] * group.size))
        wide = torch.promote_types(g.dtype, torch.float32)
        total = torch.zeros(own, *rows.shape[1:], dtype=wide, device=g.device)
        for part in parts.view(group.size, own, *rows.shape[1:]):  # in the order of the ranks
            total += part
        return total.to(g.dtype).movedim(0, dim), None, None, None
