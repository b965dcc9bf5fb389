"""The ranks that share a sequence, and their communication.

Two collectives are used: `exchange` (an all-to-all of elements) and `gather` (an all-gather of
shards). Both accept shards of different sizes, are differentiable, and sum gradients in rank order,
so that results have the same bits on every run. They are PyTorch's functional collectives: a result
is waited for at its first use.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._check import check, fail, synchronising_checks

# Renamed in torch 2.13.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor


class PeerError(RuntimeError):
    """A collective that did not complete: a rank is gone, late or at another call."""


class Group:
    """The ranks of a process group, or of a one-dimensional device mesh, in one call."""

    def __init__(self, op: str, mesh: DeviceMesh | None, group: dist.ProcessGroup | None) -> None:
        self.op = op
        if not dist.is_available() or not dist.is_initialized():
            fail(op, "group", "needs torch.distributed.init_process_group", None)
        if mesh is not None:
            ok = isinstance(mesh, DeviceMesh)
            check(ok, op, "mesh", "must be a torch.distributed.device_mesh.DeviceMesh", mesh)
            check(group is None, op, "group", "must be None with mesh", group)
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
        """Adds operator, rank and group to the error of a failed collective."""
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
        """Sends `sent[r]` elements of the flat x to rank r, and receives `received[r]` from it."""
        with self.named("all_to_all"):
            return funcol.all_to_all_single(x.contiguous(), [*received], [*sent], self.group)

    def wait(self, x: Tensor) -> Tensor:
        with self.named("a collective"):
            return funcol.wait_tensor(x)

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """send(), differentiable."""
        if self.size == 1:
            return x
        found: Tensor = _Exchange.apply(x, self, tuple(sent), tuple(received))
        return found

    def gather(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """Concatenates the shards of all ranks along dim; rank r has sizes[r] of it."""
        if self.size == 1:
            return x
        found: Tensor = _Gather.apply(x, self, dim, tuple(sizes))
        return found

    def check_alike(self, **values: Any) -> None:
        """Compares the arguments that all ranks must have in common, in the first message of a
        call, 8 bytes. Where they differ, all ranks name the argument and both values. A group
        without a backend for CPU tensors compares on the device, where a difference is an
        assertion, unless TOKENMILL_CHECK=1 lets the host read it.
        """
        if self.size == 1 or torch.compiler.is_compiling():
            return
        own = {"operator": self.op, **{name: _described(v) for name, v in values.items()}}
        digest = hashlib.blake2b(repr(own).encode(), digest_size=8).digest()
        device = "cpu" if self._has_cpu_backend() else "cuda"
        sent = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
        found = torch.empty(self.size, dtype=torch.int64, device=device)
        with self.named("the comparison of arguments"):
            dist.all_gather_into_tensor(found, sent, group=self.group)
        alike = (found == sent).all()
        if device != "cpu" and not synchronising_checks():
            torch._assert_async(alike, f"tokenmill.{self.op}: ranks differ in their arguments")
        elif not alike:
            self._name_difference(own)

    def _has_cpu_backend(self) -> bool:
        config = str(dist.get_backend_config(self.group))  # e.g. "cpu:gloo,cuda:nccl"
        return any(part.startswith("cpu:") for part in config.split(","))

    def _name_difference(self, own: dict[str, Any]) -> None:
        """Names a differing argument. All ranks call this, as all have the same digests."""
        found: list[Any] = [None] * self.size
        with self.named("the comparison of arguments"):
            dist.all_gather_object(found, own, group=self.group)
        for rank, other in enumerate(found):
            for name in {**own, **other}:
                rule = f"must be that of rank {rank} in {self.name}, {other.get(name)}"
                check(other.get(name) == own.get(name), self.op, name, rule, own.get(name))


def records_gradients(*tensors: Tensor | None) -> tuple[bool, ...]:
    """The tensors that autograd records: their backward contains collectives that every rank must
    enter.
    """
    recording = torch.is_grad_enabled()
    return tuple(recording and t is not None and t.requires_grad for t in tensors)


def _described(value: Any) -> Any:
    """The part of an argument that ranks compare: of tensors all but the values, of objects the
    type.
    """
    if isinstance(value, Tensor):
        gradient = " with a gradient" if value.requires_grad and torch.is_grad_enabled() else ""
        return f"a tensor {[*value.shape]} of {str(value.dtype)[6:]}{gradient}"
    if isinstance(value, (tuple, list, torch.Size)):
        return tuple(_described(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


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
        maximum = max(sizes)
        if rows.shape[0] < maximum:  # the collective requires shards of equal size
            rows = torch.cat([rows, rows.new_zeros(maximum - rows.shape[0], *rows.shape[1:])])
        with group.named("all_gather"):
            found = funcol.wait_tensor(_all_gather(rows.contiguous(), 0, group.group))
        if min(sizes) < maximum:
            parts = zip(found.split(maximum), sizes, strict=True)
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
        for part in parts.view(group.size, own, *rows.shape[1:]):  # in rank order
            total += part
        return total.to(g.dtype).movedim(0, dim), None, None, None
