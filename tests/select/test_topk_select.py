"""topk_select: every backend gives exactly the positions of the definition."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend, each_kernel
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

INF, NAN = float("inf"), float("nan")


def by_definition(scores, k, tie="low", first=0, last=0, length=None, start=0):
    """One row in plain Python: forced positions, then the best finite ones."""
    row = scores.double().tolist()[start:]
    row = row[: max(length, 0)] if length is not None else row
    forced = [i for i in range(len(row)) if i < first or i >= len(row) - last]
    free = [i for i, x in enumerate(row) if i not in forced and x > -INF]
    free.sort(key=lambda i: (-row[i], i if tie == "low" else -i))
    return sorted(forced + free[: k - len(forced)])


def positions(result):
    indices, counts = result[0].cpu(), result[1].cpu()
    for row, count in zip(indices, counts, strict=True):
        assert (row[:count] >= 0).all() and (row[count:] == -1).all()
    return [row[:count].tolist() for row, count in zip(indices, counts, strict=True)]


VALUES = {
    "normal": lambda g, n: torch.randn(n, generator=g),
    "few": lambda g, n: torch.randn(n, generator=g).round(),
    "relu": lambda g, n: torch.randn(n, generator=g).relu(),
    "equal": lambda g, n: torch.full((n,), 0.25),
    "zeros": lambda g, n: torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0),
    "masked": lambda g, n: torch.where(torch.rand(n, generator=g) < 0.9, -INF, 1.0),
    "nan": lambda g, n: torch.where(
        torch.rand(n, generator=g) < 0.5, NAN, torch.randn(n, generator=g)
    ),
    "infinite": lambda g, n: torch.randn(n, generator=g).sign() * INF,
    "ascending": lambda g, n: torch.arange(n) * 0.5,
    "descending": lambda g, n: torch.arange(n) * -0.5,
    "periodic": lambda g, n: torch.randn(n, generator=g) + 100.0 * (torch.arange(n) % 8 == 0),
    "huge": lambda g, n: torch.randn(n, generator=g) * 60000,
}


def some_of(best, width):
    """The first entries of each row, repeated if there are too few."""
    rows, n = best.shape
    if n == 0:
        return torch.full((rows, width), -1, dtype=torch.int32)
    return best[:, torch.arange(width) % n].int()


def nearly(g, best, width):
    """The best positions, a tenth of them replaced by random ones."""
    hints = some_of(best, width)
    wrong = torch.rand(hints.shape, generator=g) < 0.1
    anywhere = torch.randint(0, max(best.shape[1], 1), hints.shape, generator=g, dtype=torch.int32)
    return torch.where(wrong, anywhere, hints)


def padded(g, best, width):
    """Ascending positions, padded with -1."""
    hints = nearly(g, best, width).sort(1)[0]
    return torch.cat([hints, torch.full_like(hints[:, :5], -1)], 1)


# Hints [R, width] from positions [R, n] ordered by descending score.
HINTS = {
    "best": lambda g, best, width: some_of(best, width),
    "nearly": nearly,
    "padded": padded,
    "worst": lambda g, best, width: some_of(best.flip(1), width),
    "repeated": lambda g, best, width: some_of(best[:, :1], width),
    "anywhere": lambda g, best, width: torch.randint(
        -(2**31), 2**31 - 1, (len(best), width), generator=g, dtype=torch.int32
    ),
    "outside": lambda g, best, width: torch.full((len(best), width), best.shape[1]).int(),
}


@st.composite
def calls(draw, longest):
    n = draw(st.one_of(st.sampled_from([0, 1, 15, 16, 17, 64, 255]), st.integers(0, longest)))
    k = draw(st.one_of(st.sampled_from([1, 2, 16]), st.integers(1, 300)))
    first = draw(st.integers(0, min(k, 4)))
    options = {
        "tie": draw(st.sampled_from(["low", "high"])),
        "force_first": first,
        "force_last": draw(st.integers(0, min(k - first, 4))),
    }
    rows = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = [draw(st.sampled_from(list(VALUES))) for _ in range(rows)]
    wide = torch.stack([VALUES[kind](generator, n) for kind in kinds])
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    storage = torch.full((rows, n + 3), NAN, dtype=dtype)
    offset = draw(st.integers(0, 3))
    scores = storage[:, offset : offset + n]
    scores.copy_(wide)
    if draw(st.booleans()):
        options["lengths"] = torch.tensor(
            [draw(st.integers(-2, n + 2)) for _ in range(rows)], dtype=torch.int32
        )
    if draw(st.booleans()):
        options["row_starts"] = torch.tensor(
            [draw(st.integers(0, n)) for _ in range(rows)], dtype=torch.int32
        )
    if draw(st.booleans()):
        kind, width = draw(st.sampled_from(list(HINTS))), draw(st.integers(1, 400))
        options["previous"] = HINTS[kind](generator, wide.argsort(1, descending=True), width)
    return scores, k, options


def check(scores, k, options, backend):
    wanted = []
    for r, row in enumerate(scores):
        length = options["lengths"][r].item() if "lengths" in options else None
        start = options["row_starts"][r].item() if "row_starts" in options else 0
        forced = options["force_first"], options["force_last"]
        wanted.append(by_definition(row, k, options["tie"], *forced, length, start))
    device = device_of(backend)
    there = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    found = tm.topk_select(scores.to(device), k, **there, return_values=True, backend=backend)
    assert positions(found) == wanted
    by_score = tm.topk_select(
        scores.to(device), k, **there, order="score", return_values=True, backend=backend
    )
    for r, (row, some) in enumerate(zip(scores, wanted, strict=True)):
        start = options["row_starts"][r].item() if "row_starts" in options else 0
        seen = row[start:]
        assert torch.equal(found[2][r, : len(some)].cpu().nan_to_num(), seen[some].nan_to_num())
        assert (found[2][r, len(some) :] == -INF).all()
        ordered = by_score[0][r, : len(some)].tolist()
        assert sorted(ordered) == some

        def rank(i, seen=seen):
            x = seen[i].item()
            return (-x if x > -INF else INF, i if options["tie"] == "low" else -i)

        assert ordered == sorted(some, key=rank)


@pytest.mark.parametrize(
    ("backend", "isa"), [(b, i) for b, i in cpu_variants() if b == "cpu"], indirect=["isa"]
)
@examples(150)
@given(call=calls(longest=1500))
def test_definition_on_every_instruction_set(call, backend, isa):
    check(*call, backend)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "cpu"])
@examples(25)
@given(call=calls(longest=260))
def test_definition(call, backend):
    check(*call, backend)


LONG = [
    ("normal", 5000, 2048),
    ("normal", 70000, 64),
    ("equal", 70000, 700),
    ("few", 70000, 3000),
    ("masked", 70000, 20000),
    ("nan", 20000, 100),
    ("ascending", 70000, 512),
    ("descending", 70000, 512),
    ("periodic", 70000, 512),
    ("normal", 70000, 65536),
    ("normal", 300000, 64),
    ("few", 70000, 64),
    ("masked", 70000, 200),
    ("nan", 20000, 17),
    ("ascending", 70000, 64),
    ("descending", 70000, 200),
    ("periodic", 300000, 100),
]


@each_kernel
@pytest.mark.parametrize("tie", ["low", "high"])
@pytest.mark.parametrize(("kind", "n", "k"), LONG, ids=str)
def test_long_rows(kind, n, k, tie, backend):
    """Rows have more candidates than a kernel holds, for any initial guess of the threshold."""
    if backend == "triton":  # several tiles there too
        n, k = n // 16, k // 16
    row = VALUES[kind](torch.Generator().manual_seed(n + k), n)
    if kind == "masked":
        row[0] = 2.0
    found = tm.topk_select(row[None].to(device_of(backend)), k, tie=tie, backend=backend)
    valid = torch.where(row > -INF, row, -INF)
    flipped = valid.flip(0) if tie == "high" else valid
    order = flipped.argsort(descending=True, stable=True)
    order = n - 1 - order if tie == "high" else order
    count = min(k, int((row > -INF).sum()))
    assert positions(found) == [order[:count].sort()[0].tolist()]


@pytest.mark.parametrize(
    ("backend", "isa"), [(b, i) for b, i in cpu_variants() if b == "cpu"], indirect=["isa"]
)
@pytest.mark.parametrize("hint", HINTS)
def test_any_hint_gives_the_same(hint, backend, isa):
    """Rows are long enough to guess the threshold from good and bad hints; the shortest such row
    has fewer positions than a sample."""
    generator = torch.Generator().manual_seed(0)
    kinds = ["normal", "few", "equal", "masked", "nan", "infinite", "ascending", "periodic"]
    wide = torch.stack([VALUES[kind](generator, 20000) for kind in kinds])
    for n, k, width in (
        (66, 44, 50), (110, 90, 90), (20000, 3, 3), (20000, 300, 40), (20000, 1000, 1000),
        (20000, 1000, 2900),
    ):  # fmt: skip
        scores = wide[:, :n]
        best = scores.nan_to_num(-INF).argsort(1, descending=True)
        previous = HINTS[hint](generator, best, width)
        assert previous.dtype == torch.int32
        options = {"tie": "high", "force_last": 2, "return_values": True, "backend": backend}
        plain = tm.topk_select(scores, k, **options)
        hinted = tm.topk_select(scores, k, previous=previous, **options)
        for a, b in zip(plain, hinted, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def blocks_of(scores, k, **options):
    """CTAs of each kernel of a call."""
    with tm._emulator.counting() as launches:
        tm.topk_select(scores, k, backend="emulated", **options)
    return [math.prod(launch["grid"]) for launch in launches]


@pytest.mark.skipif("emulated" not in backends(), reason="counts on the PTX machine")
def test_one_row_fills_the_device():
    """The machine's device has 132 SMs."""
    row = torch.randn(1, 131072, generator=torch.Generator().manual_seed(0))
    for scores in (row, row.half()):
        launches = blocks_of(scores, 512)
        assert len(launches) == 2 and min(launches) >= 132
    assert min(blocks_of(row, 5000)) >= 132  # more than one CTA takes to the end
    assert blocks_of(row[:, :400].expand(150, 400), 20) == [150]


@pytest.mark.skipif("emulated" not in backends(), reason="of the CUDA kernels")
@pytest.mark.parametrize("n", [16385, 40001])
def test_lists_of_parts(n):
    """Each path through a row of several CTAs: candidates that fit, too many candidates, none, all
    in one part, and fewer than wanted."""
    generator = torch.Generator().manual_seed(n)
    for kind in ("normal", "equal", "masked", "ascending", "nan"):
        wide = torch.full((2, n + 3), NAN)
        wide[:, 3:] = VALUES[kind](generator, n)
        for tie, order in (("low", "index"), ("high", "score")):
            options = {"tie": tie, "order": order, "force_first": 1, "return_values": True}
            options["lengths"] = torch.tensor([n, 9000], dtype=torch.int32)
            found = tm.topk_select(wide[:, 3:], 700, backend="emulated", **options)
            wanted = tm.topk_select(wide[:, 3:], 700, backend="cpu", **options)
            for a, b in zip(found, wanted, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("backend", [b for b in backends() if b != "triton"])
@pytest.mark.parametrize("k", [700, 9000])
def test_long_rows_by_score(k, backend):
    """Rows are sorted in shared memory, or in the workspace."""
    row = torch.randn(1, 12000, generator=torch.Generator().manual_seed(k)).mul(50).round()
    found = tm.topk_select(row.to(device_of(backend)), k, order="score", backend=backend)[0]
    assert torch.equal(found[0].cpu(), row[0].argsort(descending=True, stable=True)[:k].int())


@pytest.mark.parametrize("backend", [b for b in backends() if b != "triton"])
def test_a_row_in_several_blocks(backend):
    """One row with more columns than CUDA can list as candidates; 99.9 % are equal. (Triton has one
    program per row.)"""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(140001, generator=generator)
    row[torch.rand(140001, generator=generator) < 0.999] = 0.5
    scores = row[None, 1:].to(device_of(backend))
    wanted = by_definition(scores[0].cpu(), 700, "high", 2, 3)
    found = tm.topk_select(scores, 700, tie="high", force_first=2, force_last=3, backend=backend)
    assert positions(found) == [wanted]


@each_backend
def test_pages(backend):
    device = device_of(backend)
    scores = torch.zeros(3, 40, device=device)
    table = torch.tensor([[7, -1, 2], [3, 0, 2**30]], dtype=torch.int32, device=device)
    rows = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    indices, counts, physical = tm.topk_select(
        scores, 40, block_table=table, page_size=8, row_to_batch=rows, backend=backend
    )
    for r in range(3):
        for i in range(40):
            page = table[rows[r], i // 8].item() if i // 8 < 3 else -1
            slot = page * 8 + i % 8
            assert physical[r, i] == (slot if page >= 0 and slot < 2**31 else -1)
    assert counts.tolist() == [40] * 3 and indices[0].tolist() == list(range(40))


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_starts_and_batches_out_of_range_are_clamped(backend):
    """Values that could only be refused by synchronizing never cause out-of-bounds accesses."""
    device = device_of(backend)
    scores = torch.ones(4, 24, device=device)
    starts = torch.tensor([-5, 99, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device)
    batches = torch.tensor([-1, 2, 2**31 - 1, 0], dtype=torch.int32, device=device)
    table = torch.ones(2, 3, dtype=torch.int32, device=device)
    _, counts, physical = tm.topk_select(
        scores, 5, row_starts=starts, block_table=table, page_size=8, row_to_batch=batches,
        backend=backend,
    )  # fmt: skip
    assert counts.tolist() == [5, 0, 0, 5]
    assert physical.tolist() == [[-1] * 5, [-1] * 5, [-1] * 5, [8, 9, 10, 11, 12]]


def test_scores_may_require_a_gradient():
    scores = torch.randn(2, 9, requires_grad=True)
    indices, _, values = tm.topk_select(scores, 3, return_values=True)
    assert not values.requires_grad
    assert torch.equal(values, scores.detach().gather(1, indices.long()))
