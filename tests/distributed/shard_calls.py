"""One rank of the DTensor tests: calls of every operator, compared with calls on whole tensors, and
the scenarios. Run as `python shard_calls.py RANK FOLDER [full]`; its
report is FOLDER/RANK."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from shard_scenarios import SCENARIOS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tokenmill import registry
from tokenmill._call.run import call
from tokenmill._call.spec import AXES, Sharding
from tokenmill._check import InputError

MESH = (2, 2)


class Outcome(NamedTuple):
    op: str
    call: str  # the sample, and the split of each mesh dimension
    axes: str
    refused: str  # message of an error of this package
    wrong: str


class Call(NamedTuple):
    """A sample with its results on whole tensors."""

    values: tuple
    cotangents: list
    results: list
    gradients: list


def on_every_rank(t, mesh):
    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)


def split(mesh, op, values, axes, alone):
    """The arguments as DTensors; None if there is nothing to split. alone: one argument per axis is
    split and the others are whole, except written arguments."""
    given = dict(zip(op.arguments, values, strict=True))
    placed, left = {}, set(axes)
    for name, t in given.items():
        if not isinstance(t, torch.Tensor):
            continue
        written = name in op.written
        letters = letters_of(labels_of(op).of(name, given), t)
        own = {a for a, n in zip(letters, t.shape, strict=True) if n > 1 or written}
        own &= left if alone and not written else set(axes)
        left -= own
        placed[name] = on_every_rank(t, mesh)
        if own:
            places = [Shard(letters.index(a)) if a in own else Replicate() for a in axes]
            placed[name] = placed[name].redistribute(placements=places)
    return None if left else [placed.get(name, v) for name, v in given.items()]


def run(spec, sample, values, cotangents):
    """Results including written arguments, and gradients."""
    op = spec.forward
    written = [op.arguments.index(name) for name in op.written]
    written = [i for i in written if values[i] is not None]
    leaves = [op.arguments.index(name) for name in spec.gradients_of(sample)]
    values = list(values)
    for i in written:
        values[i] = values[i].clone()
    for i in leaves:
        if values[i] is not None:
            values[i] = values[i].detach().requires_grad_()
    results = [r for r in call(spec, tuple(values)) if r.shape != (0,)]
    if not leaves:
        return [*results, *(values[i] for i in written)], []
    outs = [r for r in results if r.requires_grad]
    douts = [c for c, r in zip(cotangents(results), results, strict=True) if r.requires_grad]
    inputs = [values[i] for i in leaves if values[i] is not None]
    grads = torch.autograd.grad(outs, inputs, douts, allow_unused=True)
    return [r.detach() for r in results], grads


def draw(spec, sample):
    """A call of the sample on whole tensors."""
    args, kwargs = sample.make(torch.float32, torch.Generator().manual_seed(0))
    values = spec.lower(*args, **kwargs)
    results, gradients = run(spec, sample, values, noise)
    return Call(values, noise(results), results, gradients)


def noise(results):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]


def differs(got, want, tolerance):
    """Reason why the shards differ from the whole tensor, or ""."""
    if want is None or got is None:
        return "" if want is got else f"one of {got} and {want} is missing"
    if not isinstance(got, DTensor):
        return "no DTensor"
    if any(p.is_partial() for p in got.placements):
        got = got.full_tensor()
    else:
        want = on_every_rank(want, got.device_mesh).redistribute(placements=got.placements)
        got, want = got.to_local(), want.to_local()
    if want.dtype == torch.float8_e4m3fn:  # compared by its bits only
        got, want = got.float(), want.float()
    try:
        torch.testing.assert_close(got, want, equal_nan=True, rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        return str(error)
    return ""


def labels_of(op):
    """Labels of arguments by name in a call, and labels of results."""
    from tokenmill.distributed import _parts  # the first scenario runs before this import

    return _parts.labels_of(op.name)


def letters_of(labels, t):
    from tokenmill.distributed import _parts

    return _parts.parse(labels, t.dim()).letters


def misplaced(spec, results, axes):
    """The first result whose placement differs from its labels, or ""."""
    labels = labels_of(spec.forward).results
    there = [(r, text) for r, text in zip(results, labels, strict=False) if r.numel()]
    for r, text in there:
        letters = letters_of(text, r)
        wanted = tuple(
            Shard(letters.index(a)) if a in letters.replace(".", "") else Replicate() for a in axes
        )
        if r.placements != wanted:
            return f"{r.placements} instead of {wanted}"
    return ""


def outcome(mesh, spec, sample, drawn, axes, alone):
    call = drawn(sample)
    head = spec.name, f"{sample.name}, {axes}", axes
    placed = split(mesh, spec.forward, call.values, axes, alone)
    if placed is None:
        return Outcome(*head, "nothing to split", "")
    try:
        results, grads = run(
            spec, sample, placed, lambda _: [on_every_rank(c, mesh) for c in call.cotangents]
        )
    except InputError as error:
        return Outcome(*head, str(error), "")
    wrong = misplaced(spec, results[:1], axes)
    pairs = [*zip(results, call.results, strict=True), *zip(grads, call.gradients, strict=True)]
    for i, (got, want) in enumerate(pairs):
        wrong = wrong or differs(got, want, 1e-5 if i < len(results) else 1e-4)
    return Outcome(*head, "", wrong)


def calls(mesh, full):
    """Each sample, split along one axis on a row of the mesh, which takes every other sample; and
    once per pair of axes on the whole mesh. With full, all samples along all axes."""
    report = []
    row = mesh.get_local_rank("data")
    for spec in registry.ops().values():
        if not isinstance(spec.sharding, Sharding):
            continue
        axes = [letter for letter, word in AXES.items() if word in spec.sharding.axes]
        drawn = functools.cache(functools.partial(draw, spec))
        missing = list(axes)  # the same order on all ranks
        for number, sample in enumerate(spec.samples):
            ahead = [*missing, *(a for a in axes if a not in missing)]
            for axis in ahead if number % 2 == row or missing or full else []:
                report.append(outcome(mesh["model"], spec, sample, drawn, axis, False))
                if not report[-1].refused:
                    missing = [a for a in missing if a != axis]
                    if not full:
                        break
        pairs = ["".join(pair) for pair in itertools.permutations(axes, 2)]
        doubles = [2 * axis for axis in axes]
        for both in [*pairs, *doubles] if full else [*pairs[:1], *doubles[:1]]:
            for sample in spec.samples:
                report.append(outcome(mesh, spec, sample, drawn, both, True))
                if not report[-1].refused and not full:
                    break
    return report


def attempt(scenario, mesh):
    try:
        scenario(mesh)
    except BaseException as error:  # pytest failures are not an Exception
        return "".join(traceback.format_exception(error))
    return ""


def main(rank, folder, full):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    store = f"file://{folder}/store"
    size = MESH[0] * MESH[1]
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=5)
    )
    mesh = init_device_mesh("cpu", MESH, mesh_dim_names=("data", "model"))
    scenarios = {name: attempt(scenario, mesh) for name, scenario in SCENARIOS.items()}
    report = [[o._asdict() for o in calls(mesh, full)], scenarios]
    Path(folder, str(rank)).write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["full"])
