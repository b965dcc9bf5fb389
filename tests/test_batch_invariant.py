"""assert_batch_invariant: what it finds in code that depends on the batch, and what passes it."""

from __future__ import annotations

import pytest
import torch
from conftest import backends
from torch.nn.functional import scaled_dot_product_attention

import tokenmill as tm
from tokenmill.testing import Piece, assert_batch_invariant, packed, padded, paged


def make(tokens, g):
    return {name: torch.randn(tokens, 4, 32, generator=g) for name in "qkv"}


def split(pieces, out):
    return out.split([p.stop - p.start for p in pieces])


def exact(p):
    """Attention of a piece in an order of its own: each query by itself, in float64."""
    rows = []
    for t in range(p.start, p.stop):
        q, k, v = p.request["q"][t], p.request["k"][: t + 1], p.request["v"][: t + 1]
        weights = (q[None] * k).double().sum(-1).div(32**0.5).softmax(0)
        rows.append((weights[..., None] * v).sum(0).float())
    return torch.stack(rows)


def decode(pieces, keys_of_a_split):
    """A naive split decode: partial results of ranges of keys, joined by their sums."""
    out = []
    for p in pieces:
        q, k, v = p.new("q"), p.seen("k"), p.seen("v")
        sums, total = 0.0, 0.0
        for part in torch.arange(len(k)).split(keys_of_a_split(pieces)):
            scores = torch.einsum("qhd,khd->qkh", q, k[part]) / 32**0.5
            late = part[None] > torch.arange(p.start, p.stop)[:, None]
            weights = scores.exp().masked_fill(late[..., None], 0)
            sums = sums + torch.einsum("qkh,khd->qhd", weights, v[part])
            total = total + weights.sum(1)
        out.append(sums / total[..., None])
    return out


def by_the_batch(pieces):
    """As many splits as keep 8 cores busy."""
    splits = max(1, 8 // len(pieces))
    return -(-max(p.stop for p in pieces) // splits)


def message(fn, **options):
    with pytest.raises(AssertionError) as found:
        assert_batch_invariant(fn, make, **options)
    return str(found.value)


@pytest.mark.parametrize("scenario", ["neighbours", "sizes", "order"])
def test_a_split_that_depends_on_the_batch_is_found(scenario):
    found = message(lambda pieces: decode(pieces, by_the_batch), scenarios=(scenario,))
    assert found.startswith(f"scenario '{scenario}', fn: request "), found


def test_a_neighbour_of_9_tokens_passes_and_one_of_10_does_not():
    def run(pieces):
        return decode(pieces, lambda all_: 8 if max(p.stop for p in all_) < 10 else 16)

    options = {"scenarios": ("neighbours",)}
    assert_batch_invariant(run, make, lengths=(8,), **options)
    assert "(9 tokens, 10 tokens)" in message(run, lengths=(9,), **options)


def test_a_product_whose_tiles_depend_on_its_rows_is_found():
    w = torch.randn(128, 33, generator=torch.Generator().manual_seed(0))

    def run(pieces):
        return split(pieces, packed([p.new("q") for p in pieces])[0].flatten(1) @ w)

    assert "elements differ, in" in message(run)


def test_attention_of_pytorch_in_a_padded_batch_is_found():
    """A mask of the padding makes scaled_dot_product_attention add in another order."""

    def run(pieces):
        q, k, v = (padded([p.new(n) for p in pieces], fill=0)[0].transpose(1, 2) for n in "qkv")
        if len(pieces) == 1:
            return [scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)]
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        ends = torch.tensor([p.stop for p in pieces])
        shown = seen & (torch.arange(q.shape[2]) < ends[:, None])[:, None, None]
        out = scaled_dot_product_attention(q, k, v, attn_mask=shown).transpose(1, 2)
        return [o[: p.stop] for o, p in zip(out, pieces, strict=True)]

    message(run, scenarios=("neighbours", "order"))


def test_an_order_of_its_own_passes_every_scenario():
    assert_batch_invariant(lambda pieces: [exact(p) for p in pieces], make, lengths=(1, 9, 17, 40))


@pytest.mark.skipif("cpu" not in backends(), reason="no CPU backend")
def test_ours_passes_in_pages_of_two_sizes_and_padded():
    def cached(size):
        def run(pieces):
            q, starts = packed([p.new("q") for p in pieces])
            keys, values = ([p.seen(n) for p in pieces] for n in "kv")
            if size is None:
                (k, lengths), (v, _) = (padded(t, extra=5) for t in (keys, values))
                where = {}
            else:
                (k, table, lengths), (v, _, _) = (paged(t, size, seed=size) for t in (keys, values))
                where = {"block_table": table}
            out = tm.attention_decode(
                q, k, v, seqlens_k=lengths, cu_seqlens_q=starts, backend="cpu", **where
            )
            return split(pieces, out)

        return run

    runs = {"pages of 4": cached(4), "pages of 64": cached(64), "padded": cached(None)}
    assert_batch_invariant(runs, make, scenarios=("alone", "neighbours", "sizes", "order"))


def test_a_message_names_scenario_request_element_and_values():
    def run(pieces):
        out = [{"out": p.new("q").clone(), "state": p.new("k")[-1]} for p in pieces]
        if len(pieces) == 3:
            out[1]["out"][1, 2, 3] += 1
        return out

    found = message({"wrong": run}, scenarios=("sizes",), lengths=(4,))
    q = make(4, torch.Generator().manual_seed(4 * 100 + 1))["q"]
    a, b = (q[1, 2, 3] + 1).item(), q[1, 2, 3].item()
    assert found.startswith(
        "scenario 'sizes', wrong: request 1 of a batch of 3 (4 tokens, 4 tokens, 4 tokens): "
        f"out[1, 2, 3] is {a!r} and alone {b!r}; 1 of 512 elements differ, in "
    )


def test_nan_equals_nan_and_zeros_have_signs():
    assert_batch_invariant(
        lambda pieces: [torch.full((2,), torch.nan) * -1 for _ in pieces], make,
        scenarios=("sizes",),
    )  # fmt: skip
    signs = iter([1.0, *[-1.0] * 999])
    found = message(
        lambda pieces: [torch.zeros(2) * next(signs) for _ in pieces], scenarios=("alone",)
    )
    assert "result[0] is -0.0 and alone 0.0; 2 of 2 elements differ, in 2 bits" in found


def test_results_of_another_shape_are_found():
    found = message(lambda pieces: [p.request["q"] for p in pieces], scenarios=("decode",))
    assert "result is torch.float32 (9, 4, 32), alone torch.float32 (1, 4, 32)" in found


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"scenarios": ("size",)}, "scenarios: must be names of alone, neighbours, sizes, "),
        ({"lengths": ()}, "lengths: must be one or more integers of at least 1; got []"),
        ({"lengths": (4, 0)}, "lengths: must be one or more integers of at least 1; got [4, 0]"),
        ({"chunk_sizes": (0,)}, "chunk_sizes: must be one or more integers of at least 1; got [0]"),
        ({"fn": {}}, "fn: must have at least one callable; got []"),
        ({"fn": lambda pieces: []}, "fn: must return a result for each of 1 requests; got 0"),
        ({"fn": lambda pieces: [None]}, "fn: must return tensors; got [None]"),
    ],
)
def test_a_bad_argument_is_named(given, rule):
    fn = given.pop("fn", lambda pieces: [p.new("q") for p in pieces])
    with pytest.raises(RuntimeError) as found:
        assert_batch_invariant(fn, make, **given)
    assert str(found.value).startswith(f"tokenmill.testing.assert_batch_invariant: {rule}")


def test_pages_hold_each_sequence_and_nan_elsewhere():
    rows = [torch.randn(n, 3) for n in (5, 0, 8)]
    cache, table, lengths = paged(rows, 4, seed=3)
    assert lengths.tolist() == [5, 0, 8] and table[1].tolist() == [-1, -1]
    for line, t in zip(table, rows, strict=True):
        pages = cache[line[line >= 0]].flatten(0, 1)
        assert torch.equal(pages[: len(t)], t) and pages[len(t) :].isnan().all()
    assert Piece({"k": rows[0]}, 2, 4).new("k").shape == (2, 3)
