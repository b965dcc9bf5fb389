"""Definition of a benchmark case, and the list of all cases."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenmill import registry

Run = Callable[[], object]
device = torch.device("cpu")  # device of prepared cases; bench/run.py sets it


def place(tensor: torch.Tensor) -> torch.Tensor:
    """Moves a tensor drawn on the CPU to the measured device."""
    return tensor.to(device)


# Benchmarks other than operators, with their family: compositions of operators, and attention at
# other sizes. Modules of this package.
RECIPES = {
    "moba_attention": "sparse",
    "native_sparse_attention": "sparse",
    "attention_rates": "dense",
    "peers": "dense",
    "models": "dense",
}


# Names of peers that do a part of the work, which bounds the time from below, begin so.
PARTS = ("read of", "copy", "clone of", "product of")


class Absent(Exception):
    """A peer that cannot run here, with the reason."""


@dataclass(frozen=True)
class Case:
    """One row: our call and the calls of its peers on the same values.

    prepare returns our call and, by name, a builder of each peer's call; a builder raises Absent if
    the peer is not available. work counts useful floating-point operations; moved is the minimum
    number of bytes read and written.
    """

    op: str
    name: str
    dtype: torch.dtype
    work: float
    moved: float
    prepare: Callable[[], tuple[Run, dict[str, Callable[[], Run]]]]
    pass_name: str = "forward"
    tags: frozenset[str] = field(default_factory=frozenset)
    length: int | None = None  # tokens, if time per token is plotted against the length

    @property
    def title(self) -> str:
        return f"{self.name}, {str(self.dtype)[6:]}, {self.pass_name}"


def cases(ops: list[str] | None = None) -> Iterator[Case]:
    """All cases of the named operators and recipes (None: all), from the module of this package
    with that name, or else from the operator's samples."""
    for name in (*registry.ops(), *RECIPES):
        if ops and name not in ops:
            continue
        module = f"{__package__}.{name}"
        if importlib.util.find_spec(module):
            yield from importlib.import_module(module).cases()
        else:
            spec = registry.ops()[name]
            yield from (_sample_case(spec, sample) for sample in spec.samples)


def _sample_case(spec: registry.OpSpec, sample: registry.Sample) -> Case:
    drawn, options = sample.make(torch.float32, torch.Generator().manual_seed(0))
    args = [place(a) if isinstance(a, torch.Tensor) else a for a in drawn]
    kwargs = {k: place(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    record = spec.record(*args, **kwargs)
    result = spec.function(*args, **kwargs)
    moved = (*record, *((result,) if isinstance(result, torch.Tensor) else result))
    return Case(
        spec.name,
        sample.name,
        torch.float32,
        spec.flops(record),
        float(sum(t.nbytes for t in moved if isinstance(t, torch.Tensor))),
        lambda: (
            lambda: spec.function(*args, **kwargs),
            {"plain PyTorch": lambda: lambda: spec.plain(record)},
        ),
    )


def causal_pairs(sq: int, sk: int, left: int = -1) -> float:
    """Visible pairs of a causal mask, bottom-right aligned; `left`: keys to the left of a query's
    own position."""
    total = 0.0
    for i in range(sq):
        end = min(sk, i + sk - sq + 1)
        begin = 0 if left < 0 else max(0, i + sk - sq - left)
        total += max(0, end - begin)
    return total


def ratios_of(row: Mapping[str, Any]) -> dict[str, float]:
    """By peer, its time divided by ours."""
    return {name: peer["ratio"] for name, peer in row["peers"].items()}


def best_peer(ratios: Mapping[str, float]) -> str | None:
    """The fastest of the peers, by their ratios, that do the whole work."""
    whole = [name for name in ratios if not name.startswith(PARTS)]
    return min(whole, key=lambda name: ratios[name], default=None)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
