"""DTensors in, DTensors out. Each operator runs on the shards of its arguments, without a gather.

`OpSpec.sharding` declares the axes along which a call can be split: sequences of a batch, heads,
rows, channels. A replicated argument is sliced, without communication; a partial one is reduced; a
plain tensor that needs no gradient counts as replicated. Any other placement is an error that names
it: gathers are left to the caller, by `redistribute`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from .._call import attach
from .._call.autograd import below_autograd
from .._call.operator import TorchOp
from .._check import fail, synchronising_checks
from ..registry import OpSpec
from ._parts import Meta, Part, Plan, plan


@functools.cache
def register_sharding() -> None:
    """Registers the operators of this package with DTensor, forward and backward. Importing
    tokenmill.distributed calls it.

    Example:
        >>> import tokenmill.distributed
        >>> tokenmill.distributed.register_sharding()
    """
    attach.register_subclass(DTensor, _rule)


def _rule(op: TorchOp, namespace: str) -> Callable[..., Any]:
    def run(
        cls: type, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = op.bind(args, kwargs or {})
        mesh, parts = _plan(op, values)
        with torch.no_grad():
            local = [
                _local(v, mesh, part, name in op.written) if isinstance(part, Part) else part
                for name, v, part in zip(op.arguments, values, parts.arguments, strict=True)
            ]
        if synchronising_checks() and not op.differentiates:
            op.check_values(op.record(*local))
        results = below_autograd(op, namespace, local)
        if results is None or isinstance(results, Tensor):
            return results if results is None else _whole(results, mesh, parts.results[0])
        return tuple(_whole(r, mesh, p) for r, p in zip(results, parts.results, strict=True))

    return run


def run_reference(
    spec: OpSpec, lowered: tuple[Any, ...], op: TorchOp, arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Runs the reference on shards. op: the forward operator with the lowered arguments, or the out
    variant, with one more argument into which the first result is copied.
    """
    mesh, parts = _plan(op, arguments)
    if op is not spec.forward:
        mesh, parts = _plan(spec.forward, lowered)
    given = zip(spec.forward.arguments, lowered, parts.arguments, parts.gradients, strict=True)
    local = [
        _local(v, mesh, part, name in op.written, gradient) if isinstance(part, Part) else part
        for name, v, part, gradient in given
    ]
    record = spec.forward.record(*local)
    spec.forward.check_values(record)
    results = zip(spec.reference(record), parts.results, strict=False)
    return tuple(_whole(r, mesh, part) for r, part in results)


def _plan(op: TorchOp, values: Sequence[Any]) -> tuple[DeviceMesh, Plan]:
    first, anchor = next(
        (name, v) for name, v in zip(op.arguments, values, strict=True) if isinstance(v, DTensor)
    )
    mesh = anchor.device_mesh
    if mesh.get_coordinate() is None:
        fail(op.public_name, first, "must be on a mesh that this rank is part of", mesh)
    metas = []
    for name, v in zip(op.arguments, values, strict=True):
        if not isinstance(v, Tensor):
            metas.append(v)
            continue
        placements: Any = (Replicate(),) * mesh.ndim
        if isinstance(v, DTensor):
            placements = v.placements
            if v.device_mesh != mesh:
                fail(op.public_name, name, f"must be on the mesh of {first}", v.device_mesh)
        elif v.requires_grad or name in op.written:
            why = "it is written" if name in op.written else "it requires a gradient"
            fail(op.public_name, name, f"must be a DTensor beside {first}, as {why}", v)
        metas.append(Meta(tuple(v.shape), v.stride(), v.dtype, placements))
    return mesh, plan(op, mesh, tuple(metas))


def _local(v: Tensor, mesh: DeviceMesh, part: Part, written: bool, gradient: Any = None) -> Tensor:
    """This rank's part of an argument."""
    if not isinstance(v, DTensor):
        v = DTensor.from_local(v, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if v.placements != part.placements:
        v = v.redistribute(placements=part.placements)
    local: Tensor = v.to_local(grad_placements=gradient)
    for dim, start, _ in part.slices:
        local = local.narrow(dim, start, 1)
    if part.once:
        return torch.zeros_like(local)
    rows = local.dim() and local.shape[-1] > 1 and local.stride(-1) != 1
    return local.contiguous() if rows and not written and v.stride(-1) == 1 else local


def _whole(r: Tensor, mesh: DeviceMesh, part: Part) -> Tensor:
    """The DTensor of which r is this rank's part."""
    for dim, start, size in part.slices:
        shape = [*r.shape[:dim], size, *r.shape[dim + 1 :]]
        r = r.new_zeros(shape).slice_scatter(r, dim, start, start + 1)
    if part.once and r.requires_grad:
        r = r.detach()
    return DTensor.from_local(
        r,
        mesh,
        part.placements,
        run_check=False,
        shape=torch.Size(part.shape),
        stride=tuple(part.stride),
    )
