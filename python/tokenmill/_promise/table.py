"""What every operator promises about the bits of a request: one table, which the tests try, the
page on numerics shows and `python -m tokenmill check --invariance` runs.

The promise is made for backend "cpu". A cell says "always", or why not; then `breaks` is a case
that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import tokenmill as tm

from .. import _cli, registry
from .._call.spec import AXES
from .._invariance import SCENARIOS, assert_batch_invariant
from ..registry import OpSpec, Sample, Sharding
from . import runs
from .rows import Parts, compare_parts, compare_strides
from .runs import Run, by_head, each, either, gradients, last

COLUMNS = {
    "batch": "a request in any batch, in any order, padded or packed, equals the request alone",
    "placement": "pages, page sizes, strides and slots change nothing",
    "chunks": "a prompt in one call equals the prompt in any chunks; several decoded tokens in one "
    "call equal the same tokens one by one",
    "decode": "a token in a prompt equals the token decoded later",
    "ranks": "heads, rows or channels on ranks, as DTensors split them, equal those of the whole",
    "backward": "gradients of a request in any batch equal those of the request alone",
}
WHOLE = ("alone", "neighbours", "sizes", "order")
PLACES = ("alone", "order")
LEARNS = ("sizes", "order")
PARTS = ("chunks", "decode", "mixed")
assert {*WHOLE, *PARTS} == {*SCENARIOS}


@dataclass(frozen=True)
class Draw:
    """How a case is tried. lengths: tokens of requests."""

    dtype: torch.dtype = torch.float32
    seed: int = 0
    lengths: tuple[int, ...] = (1, 9, 64, 257)
    backend: str = "cpu"


Case = Callable[[Draw], None]  # raises AssertionError where bits differ


@dataclass(frozen=True)
class Cell:
    """holds: what is promised. breaks: a case that differs, if the promise is not "always"; `but`
    says what is promised nevertheless.
    """

    holds: tuple[Case, ...] = ()
    text: str = "always"
    breaks: Case | None = None
    but: str = ""

    @property
    def word(self) -> str:
        if self.breaks is None:
            return "always"
        return "no" if self.text.startswith("no") else "invariant"


Row = dict[str, Cell]


def always(*holds: Case, but: str = "") -> Cell:
    return Cell(holds, but=but)


def no(because: str, breaks: Case, *holds: Case, but: str = "") -> Cell:
    return Cell(holds, f"no, because {because}", breaks, but)


def asked(breaks: Case, *holds: Case) -> Cell:
    return Cell(holds, "with invariant=True", breaks)


def kit(
    given: Run | Mapping[str, Run], scenarios: tuple[str, ...] = WHOLE, *,
    make: Callable[..., Any] = runs.prompt, shortest: int = 1, longest: int = runs.MAX_TOKENS,
    **options: Any,
) -> Case:  # fmt: skip
    """Runs in scenarios of the test kit, with requests of shortest to longest tokens."""
    named = given if isinstance(given, Mapping) else {"run": given}

    def case(draw: Draw) -> None:
        assert_batch_invariant(
            {name: partial(run, backend=draw.backend) for name, run in named.items()},
            lambda tokens, g: make(tokens, g, draw.dtype), scenarios=scenarios, seed=draw.seed,
            lengths=[min(max(n, shortest), longest) for n in draw.lengths], **options,
        )  # fmt: skip

    return case


def placed(run: Run, *places: runs.Place) -> dict[str, Run]:
    """A run with keys in pages of two sizes, padded, padded wider, and in other places."""
    return {f"keys {p}": partial(run, place=p) for p in (*places, 4, 64, "padded", "wide")}


def parts(spec: OpSpec, sample: Sample, axis: str, *, backward: bool = False) -> Case:
    def case(draw: Draw) -> None:
        call = Parts(spec.name, sample, axis, draw.dtype, draw.seed)
        n = call.count
        orders = [list(range(n))[::-1]] if n else []
        if n and axis in "br" and all(name in call.cut for name in call.written):
            g = torch.Generator().manual_seed(draw.seed)
            orders += [torch.randint(n, (5,), generator=g).tolist(), [n - 1] * 2]
        for order in orders:
            if problem := compare_parts(call, order, draw.backend, backward):
                raise AssertionError(f"sample '{sample.name}', {problem}")

    return case


def strides(spec: OpSpec, sample: Sample) -> Case:
    def case(draw: Draw) -> None:
        call = Parts(spec.name, sample, "b", draw.dtype, draw.seed)
        if problem := compare_strides(call, draw.backend):
            raise AssertionError(f"sample '{sample.name}' with other strides: {problem}")

    return case


def from_registry(spec: OpSpec) -> Row:
    """What samples and `OpSpec.sharding` of an operator say."""
    learn = [s for s in spec.samples if spec.gradients_of(s)]
    rows = "r" if spec.name == "topk_select" else "b"
    axes = spec.sharding.axes if isinstance(spec.sharding, Sharding) else []
    others = [a for a in "hrc" if a != rows and AXES[a] in axes]
    row = {
        "batch": always(*(parts(spec, s, rows) for s in spec.samples)),
        "placement": always(*(strides(spec, s) for s in spec.samples)),
    }
    if others:
        row["ranks"] = always(*(parts(spec, s, a) for s in spec.samples for a in others))
    if learn:
        row["backward"] = always(*(parts(spec, s, rows, backward=True) for s in learn))
    return row


def of_prompts(function: Callable[..., Any], names: Sequence[str] = "qkv", **options: Any) -> Row:
    """A function of [B, S, H, D] that is no operator of the registry."""
    run = runs.prompts(function, names, **options)
    strided = runs.prompts(function, names, strided=True, **options)
    return {
        "batch": always(kit(run)),
        "placement": always(kit({"as it is": run, "strided": strided}, PLACES)),
        "backward": always(kit(gradients(run, *names), LEARNS)),
    }


def two_masks(draw: Draw) -> None:
    g = torch.Generator().manual_seed(draw.seed)
    mask = torch.rand(2, 9, generator=g) < 0.5
    mask[0, 0] = True
    together, alone = (tm.mask_partition(m, backend=draw.backend)[2] for m in (mask, mask[1:]))
    assert torch.equal(together[1:], alone)


def two_noises(draw: Draw) -> None:
    g = torch.Generator().manual_seed(draw.seed)
    q, k = torch.randn(2, 2, 20, 2, 16, generator=g).to(draw.dtype)

    def scores(b: slice) -> torch.Tensor:
        options: dict[str, Any] = {"gumbel_tau": 1.0, "seed": 1, "backend": draw.backend}
        return tm.attention_column_scores(q[b], k[b], **options)

    assert torch.equal(scores(slice(2))[1:], scores(slice(1, 2)))


def heads_of(op: str, sample: str) -> Case:
    spec = registry.get(op)
    [case] = [parts(spec, s, "h") for s in spec.samples if s.name == sample]
    return case


def invariant(**mods: Any) -> Case:
    """Every way to a result of attention, with one order of sums."""
    given = {"invariant": True, **mods}
    ways: dict[str, Run] = {
        "packed": partial(runs.attention, **given),
        "pages": partial(runs.attention, place=4, **given),
        "dense": partial(runs.dense_attention, **given),
        "decode": partial(runs.attention_decode, **given),
        "steps": partial(runs.attention_steps, place="wide", **given),
    }
    if not mods:  # of all heads
        ways |= {f"{n} by heads": by_head(ways[n]) for n in ("dense", "decode")}
    return kit(ways, ("alone", "sizes", *PARTS))


SHARED = "heads with few rows are multiplied together"
FEW = "few rows of queries take another kernel than many"
BEGIN = "blocks of queries begin with the chunk"
CHOSEN = "it chooses blocks by kv_block_scores"
LOCAL = "what is local begins with the call"
ALIGNED: dict[str, Any] = {"chunk_sizes": (runs.BLOCK, 4 * runs.BLOCK)}
ALIGNED_DO = "chunks of a multiple of block_q tokens do"


def dense() -> dict[str, Row]:
    packed, decode = runs.attention, runs.attention_decode
    modified, modified_decode = (partial(f, **runs.MODS) for f in (packed, decode))
    alone = runs.dense_attention
    steps = last(runs.attention_steps, 3)
    one_by_one = last(each(runs.attention_steps), 3)
    prefills: dict[str, Run] = {"packed": packed, "padded": runs.padded_attention}
    prefills["wider"] = partial(runs.padded_attention, extra=3)
    heads = {"whole": last(alone, 1), "by heads": last(by_head(alone), 1)}
    every, every_modified = invariant(), invariant(**runs.MODS)
    return {
        "attention": {
            "batch": always(kit(prefills), kit(modified, ("order",))),
            "placement": always(kit(placed(packed), PLACES)),
            "chunks": asked(kit(alone, ("chunks", "decode")), every, every_modified),
            "decode": asked(kit(either(packed, decode), ("decode",)), every, every_modified),
            "ranks": asked(kit(heads, ("alone",)), every),
            "backward": always(kit(gradients(packed, "q", "k", "v"), LEARNS)),
        },
        "attention_decode": {
            "batch": always(kit(decode), kit(steps, shortest=3)),
            "placement": always(
                kit(placed(modified_decode), PLACES), kit(placed(steps), PLACES, shortest=3)
            ),
            "chunks": asked(
                kit({"together": steps, "one by one": one_by_one}, ("alone",), shortest=3),
                every,
                every_modified,
            ),
            "decode": asked(kit(runs.attention_steps, ("decode",)), every, every_modified),
            "ranks": asked(heads_of("attention_decode", "dense"), every),
        },
    }


def linear() -> dict[str, Row]:
    packed, steps = runs.linear, runs.linear_steps
    delta, conv, titans = runs.delta, runs.conv, runs.titans
    prefills: dict[str, Run] = {"packed": packed, "padded": runs.padded_linear}
    prefills["wider"] = partial(runs.padded_linear, extra=3)
    linear_apart = kit(either(packed, steps), ("decode",))
    delta_apart = kit(either(delta, runs.delta_steps), ("decode",))
    conv_apart = kit(either(conv, runs.conv_steps), ("decode",))
    titans_apart = kit({"prompt": titans, "steps": runs.titans_steps}, ("alone",), longest=40)

    def of_steps(run: Run, longest: int) -> Row:
        slots: dict[str, Run] = {"slots": run, "other slots": partial(run, apart=True)}
        calls = {f"{n} tokens a call": partial(run, tokens=n) for n in (1, 3, 40)}
        in_slots = always(kit(slots, ("sizes",), longest=longest))
        in_calls = always(kit(calls, ("alone",), longest=longest))
        return {"batch": in_slots, "placement": in_slots, "chunks": in_calls}

    return {
        "linear_attention": {
            "batch": always(kit(prefills)),
            "chunks": no(
                "its own chunks are counted from the first token of the call",
                kit(packed, ("chunks",)),
                kit(packed, ("chunks",), chunk_sizes=(64, 128)),
                but="chunks of a multiple of 64 tokens do",
            ),
            "decode": no("a decode step adds to the state token by token", linear_apart),
            "backward": always(kit(gradients(packed, "q", "k", "v", "log_decay"), LEARNS)),
        },
        "linear_attention_decode": {
            **of_steps(steps, 40),
            "decode": no("linear_attention adds to the state chunk by chunk", linear_apart),
        },
        "delta_attention": {
            "batch": always(kit(delta)),
            "chunks": no(
                "its own chunks are counted from the first token of the call",
                kit(delta, ("chunks",)),
                kit(delta, ("chunks",), chunk_sizes=(64, 128)),
                but="chunks of a multiple of 64 tokens do",
            ),
            "decode": no(
                "a step is a chunk of one token",
                kit(delta, ("decode",)),
            ),
            "backward": always(kit(gradients(delta, *runs.DELTA), LEARNS)),
        },
        "delta_attention_decode": {
            **of_steps(runs.delta_steps, 40),
            "decode": no("delta_attention solves for the corrections of a chunk", delta_apart),
        },
        "causal_conv1d": {
            "batch": always(kit(conv)),
            "chunks": always(kit(conv, ("chunks",))),
            "decode": always(conv_apart),
            "backward": always(kit(gradients(conv, "wide_v"), LEARNS)),
        },
        "causal_conv1d_decode": {
            **of_steps(runs.conv_steps, 40),
            "decode": always(conv_apart),
        },
        "titans_memory": {
            "batch": always(kit(titans)),
            "chunks": no(
                "a call begins a chunk, whose gradients are taken at its first token",
                kit(titans, ("chunks",)),
                kit(titans, ("chunks",), **ALIGNED),
                but="chunks of a multiple of chunk_size tokens do",
            ),
            "decode": no("PyTorch computes a decode step", titans_apart),
            "backward": always(kit(gradients(titans, *runs.TITANS), LEARNS)),
        },
        "titans_memory_decode": {
            **of_steps(runs.titans_steps, 18),
            "decode": no("titans_memory computes a prompt", titans_apart),
        },
    }


def select() -> dict[str, Row]:
    lists, of_tokens = runs.hip_lists, partial(runs.hip_lists, block_q=1)
    scores = last(runs.block_scores, 3)
    again = {f"by {n}": partial(runs.pooled_again, tokens=n) for n in (1, 7, 16, 17)}
    pooled = always(kit({"whole": runs.pooled} | again, ("alone",), longest=130))
    indexed = always(kit(runs.indexer, PARTS, make=runs.ties))
    appended = {f"pages of {n}": partial(runs.appended, place=n) for n in (4, 64)}
    return {
        "attention_column_scores": {
            "batch": no(
                "Gumbel noise is drawn by the place in the batch",
                two_noises,
                but="scores without noise do",
            )
        },
        "mask_partition": {"batch": no("places count through all sequences", two_masks)},
        "block_pool_keys": {
            "batch": always(kit(runs.pooled)),
            "placement": always(kit(placed(runs.pooled), PLACES)),
            "chunks": pooled,
            "decode": pooled,
        },
        "block_pool_keys_update": {"chunks": pooled, "decode": pooled},
        "hip_block_select": {
            "batch": always(kit(lists)),
            "placement": always(kit(placed(lists, "packed"), PLACES, make=runs.ties)),
            "chunks": no(
                BEGIN,
                kit(lists, ("chunks",)),
                kit(lists, ("chunks",), **ALIGNED),
                kit(of_tokens, PARTS, make=runs.ties),
                but=ALIGNED_DO,
            ),
            "decode": no(
                BEGIN,
                kit(lists, ("decode",)),
                kit(of_tokens, ("decode",), make=runs.ties),
                but="block_q = 1 does",
            ),
        },
        "indexer_topk_select": {
            "batch": always(kit(runs.indexer)),
            "placement": always(kit(placed(runs.indexer, "packed"), PLACES, make=runs.ties)),
            "chunks": indexed,
            "decode": indexed,
        },
        "kv_block_scores": {
            "batch": always(kit(scores, shortest=3)),
            "placement": always(kit(placed(scores), PLACES, shortest=3)),
            "chunks": no(FEW, kit(runs.block_scores, ("mixed",))),
            "decode": no(FEW, kit(runs.block_scores, ("decode",))),
            "ranks": no(SHARED, heads_of("kv_block_scores", "odd blocks")),
        },
        "kv_cache_append": {
            "batch": always(kit(appended)),
            "placement": always(kit(appended, PLACES)),
            "chunks": always(kit(appended, ("chunks", "mixed"))),
            "decode": always(kit(appended, ("decode",))),
        },
    }


def sparse() -> dict[str, Row]:
    blocks, of_tokens = runs.block_sparse, partial(runs.block_sparse, block_q=1)
    steps, one_by_one = last(runs.sparse_decode, 3), last(each(runs.sparse_decode), 3)
    apart = kit({"prompt": of_tokens, "steps": each(runs.sparse_decode)}, ("alone",))
    return {
        "block_sparse_attention": {
            "batch": always(kit(blocks)),
            "placement": always(kit(placed(blocks, "packed"), PLACES)),
            "chunks": always(
                kit(blocks, ("chunks",), **ALIGNED),
                kit(of_tokens, PARTS),
                but="cut at multiples of block_q, as lists belong to blocks of queries",
            ),
            "decode": no(
                "sparse_decode_attention cuts keys into ranges",
                apart,
                kit(of_tokens, ("decode",)),
                but="a call of one token with block_q = 1 does",
            ),
            "ranks": no(SHARED, heads_of("block_sparse_attention", "latent")),
            "backward": always(kit(gradients(blocks, "q", "k", "v"), LEARNS)),
        },
        "sparse_decode_attention": {
            "batch": always(kit(steps, shortest=3)),
            "placement": always(kit(placed(steps), PLACES, shortest=3)),
            "chunks": no(
                FEW, kit({"together": steps, "one by one": one_by_one}, ("alone",), shortest=3)
            ),
            "decode": no("block_sparse_attention computes a prompt", apart),
            "ranks": no(SHARED, heads_of("sparse_decode_attention", "shared list")),
        },
        **landmarks(),
        **compositions(),
    }


def landmarks() -> dict[str, Row]:
    prefill = runs.prompts(tm.landmark_attention, block=runs.BLOCK)
    apart = kit(either(prefill, runs.landmark_decode), ("decode", "chunks"), longest=130)
    steps = last(partial(runs.landmark_decode, topk=2), 3)
    return {
        "landmark_attention": {
            "chunks": no("landmark_decode computes a chunk", apart),
            "decode": no("landmark_decode merges parts by their lse", apart),
        },
        "landmark_decode": {
            "batch": always(kit(steps, shortest=3)),
            "placement": always(kit(placed(steps), PLACES, shortest=3)),
            "chunks": no(LOCAL, apart),
            "decode": no(LOCAL, apart),
        },
    }


def compositions() -> dict[str, Row]:
    core: dict[str, Any] = {"window": 32, "group": 8}
    moba: dict[str, Any] = {"block": runs.BLOCK, "topk": 3}
    nsa: dict[str, Any] = {"block": 16, "stride": 8, "select_block": 16, "topk": 4, "window": 200}
    core_parts = either(runs.prompts(tm.core_context_attention, **core), runs.core_steps)
    moba_parts = runs.chunks(tm.moba_attention, **moba)
    nsa_parts = runs.chunks(tm.native_sparse_attention, ("q", "gates"), **nsa)
    windowed = f"its window is attention, and {CHOSEN}"
    return {
        "core_context_attention": {
            **of_prompts(tm.core_context_attention, **core),
            "decode": no(
                "a step of CoreContextState is an attention_decode", kit(core_parts, ("decode",))
            ),
        },
        "hip_attention": {
            "batch": always(kit(runs.hip)),
            "placement": always(kit(placed(runs.hip), PLACES, make=runs.ties)),
            "chunks": no(
                BEGIN,
                kit(runs.hip, ("chunks",)),
                kit(runs.hip, ("chunks",), **ALIGNED),
                but=ALIGNED_DO,
            ),
            "decode": no(BEGIN, kit(runs.hip, ("decode",))),
        },
        "moba_attention": {
            **of_prompts(tm.moba_attention, **moba),
            "chunks": no(CHOSEN, kit(moba_parts, ("mixed",), make=runs.ties)),
            "decode": no(CHOSEN, kit(moba_parts, ("decode",), make=runs.ties)),
        },
        "native_sparse_attention": {
            **of_prompts(tm.native_sparse_attention, ("q", "k", "v", "gates"), **nsa),
            "chunks": no(windowed, kit(nsa_parts, ("mixed",))),
            "decode": no(windowed, kit(nsa_parts, ("decode",))),
        },
    }


def differences(row: Row, draw: Draw) -> dict[str, str]:
    """Where what a row promises does not hold, and what differs, by column."""
    tried: dict[Case, str] = {}
    found = {}
    for column, cell in row.items():
        for case in cell.holds:
            if case not in tried:
                try:
                    case(draw)
                    tried[case] = ""
                except Exception as error:  # a failing call does not stop the others
                    tried[case] = _cli.one_line(error)
            if tried[case]:
                found[column] = tried[case]
    return found


def promise() -> dict[str, Row]:
    """The rows of the table by operator, in the order of the registry, then compositions."""
    found = {name: from_registry(spec) for name, spec in registry.ops().items()}
    for op, row in (dense() | linear() | select() | sparse()).items():
        before = found.setdefault(op, {})
        for column, cell in row.items():
            partly = column in before and (not cell.breaks or cell.but)
            also = before[column].holds if partly else ()
            before[column] = replace(cell, holds=(*also, *cell.holds))
    return found


def markdown() -> str:
    """The table, and what is promised where a cell has exceptions."""
    lines = [f"| operator | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    notes = []
    for op, row in promise().items():
        cells = (row[c].text if c in row else "" for c in COLUMNS)
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
        notes += [f"- `{op}`, {c}: {row[c].but}." for c in COLUMNS if c in row and row[c].but]
    return "\n".join([*lines, "", *notes, ""])
