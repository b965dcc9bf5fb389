"""sparse_decode_attention: identities between different calls."""

from __future__ import annotations

import math

import pytest
import torch
from each import each_backend, each_kernel, ints, randn
from hypothesis import given
from hypothesis import strategies as st
from sparse_decode_calls import INF, close, drawn, every_block, lists_of, run, same
from tier import examples

import tokenmill as tm
from tokenmill.reference.sparse.sparse_decode_attention import rotate


@each_backend
@pytest.mark.parametrize("block_k", [1, 16])
@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("sq", [1, 3])
def test_a_list_of_everything_is_dense_decode(sq, page_size, block_k, backend):
    lengths = (130, 64, 1, 0)
    args, kwargs = drawn(
        backend, lengths, sq=sq, h=6, hk=2, capacity=136, page_size=page_size, softcap=2.0
    )
    kwargs["sink"] = randn(6, backend=backend)
    dense = {
        k: v for k, v in kwargs.items() if k in ("seqlens_k", "block_table", "softcap", "sink")
    }
    want = tm.attention_decode(*args[:3], **dense, return_lse=True, backend=backend)
    kwargs["block_k"] = block_k
    for heads in (1, 2, 6):
        args[3:] = every_block(len(lengths), heads, 136, block_k, backend)
        for sinks, recent in ((0, 0), (5, 9), (0, 200), (300, 0)):
            out, lse, mass = run(backend, args, kwargs, num_sink=sinks, num_recent=recent)
            close((out, lse), want)
            assert mass.shape[1] == max(heads, 2)


@each_backend
@pytest.mark.parametrize("block_k", [1, 4])
@pytest.mark.parametrize("sq", [1, 3])
def test_any_partition_of_the_keys_is_the_same(sq, block_k, backend):
    """Visible keys give the same result, whether a list, the first or the last keys name them."""
    lengths, sinks, recent = (90, 41, 6), 12, 11
    args, kwargs = drawn(backend, lengths, sq=sq, capacity=96, block_k=block_k)
    rows = [
        [i for i in range(-(-n // block_k)) if (i + 1) * block_k <= sinks or i % 3 == 0
         or (i + 1) * block_k > n - sq + 1 - recent]
        for n in lengths
    ]  # fmt: skip
    outside = [
        [i for i in row if (i + 1) * block_k > sinks and i * block_k < n - recent]
        for row, n in zip(rows, lengths, strict=True)
    ]
    results = [
        run(backend, [*args[:3], *lists_of(chosen, backend)], kwargs,
            num_sink=s, num_recent=r, return_mass=False)
        for chosen, s, r in (
            (rows, sinks, recent), (outside, sinks, recent), (rows, sinks, 3), (rows, 2, recent),
        )
    ]  # fmt: skip
    for found in results[1:]:
        close(found, results[0])
    if sq == 1 and block_k == 1:  # last keys differ between queries
        close(run(backend, [*args[:3], *lists_of(rows, backend)], kwargs, return_mass=False),
              results[0])  # fmt: skip


@each_backend
@pytest.mark.parametrize("n", [1, 5, 300])
def test_a_compensation_token_is_as_many_copies(n, backend):
    args, kwargs = drawn(backend, h=6, hk=2, num_sink=3, num_recent=4, extra=1, counted=False)
    count = torch.full((3, 2, 1), math.log(n), device=args[0].device)
    one = run(backend, args, kwargs, extra_log_count=count)
    copies = {name: kwargs[name].repeat(1, n, 1, 1) for name in ("extra_k", "extra_v")}
    close(one, run(backend, args, kwargs | copies))
    none = {k: v for k, v in kwargs.items() if not k.startswith("extra")}
    absent = torch.full_like(count, -INF)
    close(run(backend, args, kwargs, extra_log_count=absent), run(backend, args, none))


@each_backend
@pytest.mark.parametrize("block_k", [1, 4])
def test_tokens_at_once_are_tokens_one_by_one(block_k, backend):
    sq, lengths = 4, (50, 64, 3)
    args, kwargs = drawn(
        backend, lengths, sq=sq, h=6, hk=2, entries=40 // block_k, block_k=block_k, num_sink=5,
        num_recent=6, extra=2, pairs=10,
    )  # fmt: skip
    out, lse, mass = run(backend, args, kwargs)
    total = torch.zeros_like(mass)
    for i in range(sq):
        n = [max(length - sq + i + 1, 0) for length in lengths]
        one = run(
            backend, [args[0][:, i : i + 1], *args[1:]], kwargs, seqlens_k=ints(*n, backend=backend)
        )
        there = [b for b in range(len(lengths)) if n[b]]
        close((one[0][there, 0], one[1][there, :, 0]), (out[there, i], lse[there, :, i]))
        total += one[2]
    close((total,), (mass,))


@each_kernel
@pytest.mark.parametrize("lists", [1, 2, 6])
@pytest.mark.parametrize("splits", [0, 3])
def test_mass_is_what_the_entries_got(splits, lists, backend):
    """Mass sums to one per row if the list covers everything; otherwise to the remaining
    probability."""
    args, kwargs = drawn(backend, sq=2, h=6, hk=2, lists=lists, num_splits=splits)
    args[3:] = every_block(3, lists, 64, 8, backend)
    kwargs["block_k"] = 8
    _, lse, mass = run(backend, args, kwargs)
    row_heads = max(lists, 2)
    rows = torch.full((3, row_heads), 2.0 * 6 / row_heads, device=mass.device)
    close((mass.sum(-1),), (rows,))
    _, lse, mass = run(backend, args, kwargs, num_sink=9, num_recent=7)
    first = run(backend, args, kwargs, num_sink=9, num_recent=7, return_mass=True)
    assert same((lse, mass), first[1:])
    args[4] = torch.zeros_like(args[4])
    _, rest, none = run(backend, args, kwargs, num_sink=9, num_recent=7)
    assert torch.all(none == 0)
    left = (1 - (rest - lse).exp()).unflatten(1, (row_heads, -1)).sum((2, 3))
    close((mass.sum(-1),), (left,))


@each_backend
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("entries", [0, 20])
def test_places_are_those_of_a_cache_rotated_from_scratch(entries, interleaved, backend):
    """The call equals dense attention over the kept keys, rotated by their slots."""
    lengths, pairs = (60, 25, 4), 12
    args, kwargs = drawn(
        backend, lengths, h=6, hk=2, lists=1, entries=entries, num_sink=3, num_recent=7,
        pairs=pairs, interleaved=interleaved, pos_mode="cache",
    )  # fmt: skip
    out, lse, _ = run(backend, args, kwargs)
    cos, sin = kwargs["rope"]
    for b, n in enumerate(lengths):
        listed = args[3][b, 0, : args[4][b, 0]].tolist()
        kept = sorted({*range(min(3, n)), *listed, *range(max(n - 7, 0), n)})
        turn = [t[: len(kept), None] for t in (cos, sin)]
        k = rotate(args[1][b, kept], *turn, interleaved)[None]
        q = rotate(args[0][b], *(t[-1] for t in turn), interleaved)[None]
        want = tm.attention_decode(
            q, k, args[2][b, kept][None], seqlens_k=ints(len(kept), backend=backend),
            return_lse=True, backend=backend,
        )  # fmt: skip
        close((out[b : b + 1], lse[b : b + 1]), want, atol=2e-5)


@each_backend
def test_positions_are_those_of_a_rotated_cache(backend):
    """Rotating before the call or inside it gives the same result."""
    lengths, sq = (60, 25, 4), 2
    args, kwargs = drawn(backend, lengths, sq=sq, num_sink=3, num_recent=7, pairs=16)
    cos, sin = kwargs.pop("rope")
    q, k = args[0].clone(), rotate(args[1], cos[:, None], sin[:, None], False)
    for b, n in enumerate(lengths):
        at = slice(n - sq, n)
        q[b] = rotate(q[b], cos[at, None], sin[at, None], False)
    close(
        run(backend, args, kwargs, rope=(cos, sin)),
        run(backend, [q, k, *args[2:]], kwargs),
        atol=2e-5,
    )


@each_backend
def test_pieces_merge_to_the_whole(backend):
    """The lists are disjoint, for example on different machines."""
    args, kwargs = drawn(backend, (200, 77), sq=1, lists=1, entries=64, capacity=200, seed=3)
    whole = run(backend, args, kwargs, return_mass=False)
    pieces = []
    for part in range(3):
        rows = [args[3][b, 0, : args[4][b, 0]][part::3].tolist() for b in range(2)]
        lists = lists_of(rows, backend)
        pieces.append(run(backend, [*args[:3], *lists], kwargs, return_mass=False))
    outs, lses = (torch.stack(t) for t in zip(*pieces, strict=True))
    close(tm.merge_attention_states(outs, lses, backend=backend), whole)


@each_kernel
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_pages_hold_the_same_as_a_dense_cache(page_size, backend):
    lengths, options = (130, 64, 1), {"capacity": 192, "entries": 90, "num_recent": 5}
    dense, kwargs = drawn(backend, lengths, **options)
    paged, table = drawn(backend, lengths, page_size=page_size, **options)
    table["block_table"] = table["block_table"].clone()
    want = run(backend, dense, kwargs)
    assert same(run(backend, [*paged[:3], *dense[3:]], table), want)


@each_backend
def test_evicted_pages_are_as_if_they_were_not_listed(backend):
    """Evicted pages are covered by a list, by the first keys and by the last keys."""
    n, page = 64, 8
    args, kwargs = drawn(backend, (n,), lists=1, page_size=page, num_sink=12, num_recent=20)
    args[3:] = lists_of([list(range(0, n, 3))], backend)
    gone = (1, 3, 6)
    whole = kwargs["block_table"].clone()
    for i in gone:
        kwargs["block_table"][0, i] = -1
    found = run(backend, args, kwargs, return_mass=False)
    kept = [j for j in range(n) if (j < 12 or j >= n - 20 or j % 3 == 0) and j // page not in gone]
    args[3:] = lists_of([kept], backend)
    want = run(
        backend, args, kwargs, block_table=whole, num_sink=0, num_recent=0, return_mass=False
    )
    close(found, want)


@each_backend
@pytest.mark.parametrize("sq", [1, 2])
def test_an_entry_counts_once(sq, backend):
    """Repeated and descending ids are skipped in any place."""
    args, kwargs = drawn(backend, (60,), sq=sq, lists=1)
    good, bad = [3, 9, 20, 31], [3, 9, 9, 20, 20, 20, 31, 31]
    want = run(backend, [*args[:3], *lists_of([good], backend)], kwargs)
    got = run(backend, [*args[:3], *lists_of([bad], backend)], kwargs)
    close(got[:2], want[:2])
    assert torch.all(got[2][..., [2, 4, 5, 7]] == 0)
    close((got[2][..., [0, 1, 3, 6]],), (want[2],))


@each_backend
@examples(12)
@given(data=st.data())
def test_lists_in_any_order_are_the_sets_of_block_sparse_attention(backend, data):
    """An id counts if it exceeds every id before it."""
    block_k, num_sink, num_recent, sq = 4, *(data.draw(st.integers(0, 9)) for _ in range(2)), 2
    args, kwargs = drawn(
        backend, (57,), sq=sq, lists=1, block_k=block_k, num_sink=num_sink, num_recent=num_recent
    )
    row = data.draw(st.lists(st.integers(-2, 16), min_size=1, max_size=9))
    args[3:] = lists_of([row], backend)
    q, k, v = args[0], args[1][:, :57], args[2][:, :57]
    indices, counts = (t[:, :, None] for t in args[3:])
    want = tm.block_sparse_attention(
        q, k, v, indices, counts, block_q=2, block_k=block_k, causal=True, num_sink=num_sink,
        num_recent=num_recent, return_lse=True, backend="reference",
    )  # fmt: skip
    out, lse, mass = run(backend, args, kwargs)
    close((out, lse), want, atol=2e-5)
    largest = -1
    for e, block in enumerate(row):
        assert block > largest or bool((mass[..., e] == 0).all())
        largest = max(largest, block)
