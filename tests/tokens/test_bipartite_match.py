"""bipartite_match against a literal reading of ToMe, and properties of its other partitions."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm


def literal(
    metric, r, sources, targets, protect_first=0, protect_targets=0, threshold=None, end=None
):
    """One sequence: the row of each token, token by token."""
    products = metric @ metric.T
    pairs = []
    for i in sources:
        partner = max(targets[protect_targets:], key=lambda j: (products[i, j].item(), -j))
        pairs.append((-products[i, partner].item(), i, partner))
    able = sorted(p for p in pairs if protect_first <= p[1] < (end or len(metric)))[: max(r, 0)]
    merged = {i: j for minus, i, j in able if threshold is None or -minus >= threshold}
    rows = [i for i in sources if i not in merged] + targets
    return [rows.index(merged.get(i, i)) for i in range(len(metric))], len(rows)


def whole_numbers(tokens, seed, batch=2, channels=6):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (batch, tokens, channels), generator=g).float()


def check(metric, r, sources, targets, backend, literal_options, **options):
    """Checks with integers: equal products are equal on every backend."""
    assign, num_out, score = tm.bipartite_match(
        metric.to(device_of(backend)), r, normalize=False, backend=backend, **options
    )
    assert assign.dtype == torch.int32
    want = [literal(m, r, sources, targets, **literal_options) for m in metric]
    assert assign.tolist() == [rows for rows, _ in want]
    assert num_out == max(count for _, count in want)
    best = (metric[:, sources] @ metric[:, targets].mT)[
        :, :, literal_options.get("protect_targets", 0) :
    ]
    assert torch.equal(score.cpu(), best.amax(2))


@each_backend
@examples(15)
@given(
    tokens=st.integers(4, 40),
    r=st.integers(-1, 30),
    class_token=st.booleans(),
    distilled=st.booleans(),
    threshold=st.sampled_from([None, None, 4, 6.5, 100]),
    seed=st.integers(0, 2**31),
)
def test_tome(tokens, r, class_token, distilled, threshold, seed, backend):
    maximum = (tokens - int(class_token) - int(distilled)) // 2
    o = {"protect_first": int(class_token), "protect_targets": int(distilled)}
    o["threshold"] = threshold
    parts = list(range(0, tokens, 2)), list(range(1, tokens, 2))
    check(whole_numbers(tokens, seed), min(r, maximum), *parts, backend, o, **o)
    metric = whole_numbers(tokens, seed).to(device_of(backend))
    many, as_many = (tm.bipartite_match(metric, n, backend=backend, **o) for n in (99, maximum))
    assert torch.equal(many[0], as_many[0])
    assert many[1] == as_many[1]
    assert threshold is not None or many[1] == tokens - maximum


@each_backend
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(("grid", "cell"), [((5, 7), (2, 2)), ((4, 6), (2, 3)), ((3, 3), (4, 1))])
def test_grid(backend, grid, cell, drawn):
    tokens = grid[0] * grid[1] + 1  # a leading class token
    metric = whole_numbers(tokens, 0)
    cells = [
        [1 + (y * cell[0] + i) * grid[1] + x * cell[1] + j
         for i in range(cell[0]) for j in range(cell[1])]
        for y in range(grid[0] // cell[0]) for x in range(grid[1] // cell[1])
    ]  # fmt: skip
    generator = None
    places = [0] * len(cells)
    if drawn:
        generator = torch.Generator().manual_seed(3)
        places = torch.randint(len(cells[0]) if cells else 1, (len(cells),), generator=generator)
        generator = torch.Generator().manual_seed(3)
    targets = sorted(own[place] for own, place in zip(cells, places, strict=True))
    sources = [i for i in range(tokens) if i not in targets]
    o = {"partition": "grid", "grid": grid, "cell": cell, "generator": generator}
    if targets:
        check(metric, 9, sources, targets, backend, {"protect_first": 1}, protect_first=1, **o)
    else:
        assign, num_out, score = tm.bipartite_match(
            metric.to(device_of(backend)), 9, protect_first=1, backend=backend, **o
        )  # fmt: skip
        assert num_out == tokens
        assert torch.equal(assign.cpu(), torch.arange(tokens, dtype=torch.int32).expand(2, -1))
        assert torch.equal(score, torch.full_like(score, -torch.inf))


@each_backend
@examples(8)
@given(
    destinations=st.lists(st.integers(0, 19), min_size=1, max_size=18, unique=True),
    protect_first=st.integers(0, 4),
    protect_targets=st.integers(0, 1),
    r=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_index(destinations, protect_first, protect_targets, r, seed, backend):
    targets = sorted(destinations)
    sources = [i for i in range(20) if i not in targets]
    open_targets = len(targets) > protect_targets
    r = min(r, max(len(sources) - protect_first, 0)) if open_targets else 0
    if not open_targets:
        return
    o = {"protect_first": protect_first, "protect_targets": protect_targets}
    chosen = torch.tensor(destinations, dtype=torch.int64 if seed % 2 else torch.int32)
    check(whole_numbers(20, seed), r, sources, targets, backend, o, partition="index",
          destinations=chosen.to(device_of(backend)), **o)  # fmt: skip


@each_backend
@pytest.mark.parametrize("r", [3, 99])
@pytest.mark.parametrize(("tokens", "group", "first"), [(14, 3, 0), (13, 3, 1), (9, 4, 5)])
def test_last_of_each_group(backend, tokens, group, first, r):
    """Tokens after the last whole group stay, however many may merge."""
    end = first + (tokens - first) // group * group
    targets = list(range(first + group - 1, end, group))
    sources = [i for i in range(tokens) if i not in targets]
    check(whole_numbers(tokens, 0), r, sources, targets, backend,
          {"protect_first": first, "end": end}, partition="kth", group=group,
          protect_first=first)  # fmt: skip


@each_backend
def test_random(backend):
    metric = torch.randn(2, 30, 8).to(device_of(backend))
    o = {"partition": "random", "protect_first": 2, "backend": backend}
    found = set()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        assign, num_out, score = tm.bipartite_match(metric, 7, generator=generator, **o)
        assert (num_out, score.shape) == (23, (2, 7))
        assert torch.equal(assign[:, :2].cpu(), torch.tensor([[0, 1]] * 2, dtype=torch.int32))
        assert sorted(set(assign[0].tolist())) == list(range(23))
        found.add(tuple(assign[0].tolist()))
    assert len(found) == 3
    assert tm.bipartite_match(metric, 99, **o)[1] == 2
    assert tm.bipartite_match(metric, 99, protect_targets=5, **o)[1] == 6


@each_backend
def test_nothing_to_merge(backend):
    metric = torch.randn(2, 7, 4).to(device_of(backend))
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3], dtype=torch.int32)
    for o in ({}, {"protect_first": 7}, {"protect_targets": 3}, {"threshold": 2}):
        r = 3 if o else 0
        assign, num_out, _ = tm.bipartite_match(metric, r, backend=backend, **o)
        assert num_out == 7
        assert torch.equal(assign.cpu(), order.expand(2, -1))
    for shape in ((2, 0, 4), (0, 5, 4), (2, 1, 4)):
        assign, num_out, _ = tm.bipartite_match(metric.new_zeros(shape), 1, backend=backend)
        merged = 1 if shape == (0, 5, 4) else 0
        assert (assign.shape, num_out) == (shape[:2], shape[1] - merged)


def test_scores_choose_directions_unless_told_otherwise():
    metric = torch.tensor([[[1.0, 0], [1, 0.2], [0, 3], [9, 9]]])
    assert tm.bipartite_match(metric, 1)[0].tolist() == [[1, 1, 0, 2]]
    assert tm.bipartite_match(metric, 1, normalize=False)[0].tolist() == [[0, 1, 2, 2]]
    assert not tm.bipartite_match(metric.requires_grad_(), 1)[2].requires_grad


def test_compiles_as_one_graph():
    metric = torch.randn(2, 20, 8)
    for o in ({}, {"partition": "grid", "grid": (4, 5)}, {"partition": "kth", "group": 3}):
        run = torch.compile(
            lambda m, o=o: tm.bipartite_match(m, 6, **o), fullgraph=True, backend="aot_eager"
        )
        got, want = run(metric), tm.bipartite_match(metric, 6, **o)
        assert got[1] == want[1]
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"metric": torch.zeros(4, 8)}, "metric: must have 3 dimensions [B, N, C]; got 2"),
        ({"metric": torch.zeros(1, 4, 0)}, "metric: must have 1 to 4096 channels; got 0"),
        ({"r": 1.0}, "r: must be an integer; got 1"),
        ({"partition": "odd"},
         "partition: must be 'alternate', 'grid', 'index', 'kth' or 'random'; got 'odd'"),
        ({"protect_first": 21}, "protect_first: must be 0 to the number of tokens, 20; got 21"),
        ({"protect_targets": -1}, "protect_targets: must not be negative; got -1"),
        ({"normalize": 1}, "normalize: must be a bool; got 1"),
        ({"threshold": "high"}, "threshold: must be a number or None; got 'high'"),
        ({"grid": (4, 5)}, "grid: requires partition 'grid'; got [4, 5]"),
        ({"partition": "grid"}, "grid: must be two positive integers; got None"),
        ({"partition": "grid", "grid": (4, 6)},
         "grid: must have a place for each token after the protected ones, 20; got [4, 6]"),
        ({"partition": "grid", "grid": (4, 5), "cell": (0, 2)},
         "cell: must be two positive integers; got [0, 2]"),
        ({"generator": torch.Generator()},
         "generator: requires partition 'grid' or 'random'; got 'alternate'"),
        ({"group": 3}, "group: requires partition 'kth'; got 3"),
        ({"partition": "kth", "group": 0}, "group: must be a positive integer; got 0"),
        ({"partition": "index"}, "destinations: must be a tensor; got None"),
        ({"destinations": torch.zeros(1)},
         "destinations: requires partition 'index'; got a tensor of shape [1]"),
        ({"partition": "index", "destinations": torch.zeros(1)},
         "destinations: must be int32 or int64; got float32"),
        ({"partition": "index", "destinations": torch.zeros(21, dtype=torch.int32)},
         "destinations: must have shape [Nd] with Nd up to the number of tokens, 20; got [21]"),
        ({"partition": "index", "destinations": torch.tensor([3, 20])},
         "destinations: must be 0 to 19; got 20"),
        ({"partition": "index", "destinations": torch.tensor([3, 1, 3])},
         "destinations: must not name a token twice; got 3"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(options, error):
    with pytest.raises(RuntimeError) as info:
        tm.bipartite_match(**{"metric": torch.zeros(1, 20, 8), "r": 4} | options)
    assert str(info.value).startswith(f"tokenmill.bipartite_match: {error}")
