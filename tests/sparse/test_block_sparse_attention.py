"""block_sparse_attention: any call, identities, and memory that must not be read."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import INF, NAN, block_sparse_samples, drawn, full_lists, gradients, run
from conftest import assert_same, backends, cpu_variants, device_of
from each import each_backend, each_dtype, each_kernel
from hypothesis import given
from tier import examples

import tokenmill as tm
from tokenmill import registry
from tokenmill.sparse.block_sparse_attention_cases import block_sparse_call
from tokenmill.testing import compare

SPEC = registry.get("block_sparse_attention")


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(120)
@given(sample=block_sparse_samples(longest=150))
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    assert not [c for c in compare(SPEC, sample, backend, dtype) if not c.ok], sample.name


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@each_dtype
@examples(6)
@given(sample=block_sparse_samples(longest=50))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


LONG = [
    registry.Sample(
        f"{block_q}x{block_k} {options}",
        block_sparse_call(
            sq=500, sk=900, b=1, h=2, hk=1, d=40, dv=72, block_q=block_q, block_k=block_k,
            entries=400 // block_k, **options,
        ),
    )
    for block_q, block_k in ((1, 4), (16, 1), (32, 16), (64, 64), (128, 2), (128, 128))
    for options in (
        {"lists": 2},
        {"lists": 1, "causal": True, "num_sink": 3, "num_recent": 70},
    )
]  # fmt: skip


@pytest.mark.parametrize("isa", [i for b, i in cpu_variants() if b == "cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", LONG, ids=lambda sample: sample.name)
def test_long_sequences_cross_every_tile_border(sample, dtype, isa):
    assert not [c for c in compare(SPEC, sample, "cpu", dtype) if not c.ok]


def leaves_of(args):
    return [t.detach().requires_grad_() for t in args[:3]]


def close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# --- identities -------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("causal", [False, True])
def test_every_block_is_attention(backend, causal):
    args, kwargs = drawn(backend, sq=50, sk=70, block_k=8, causal=causal)
    sink = torch.tensor([0.5, -1.0, INF, -INF] if causal else [2.0, 0.0, 1.0, -0.5])
    leaves = q, k, v, sink = [*leaves_of(args), sink.to(args[0].device).requires_grad_()]
    lists = full_lists(q, k, 16, 8)
    ours = run(backend, (q, k, v, *lists), kwargs, sink=sink)
    options = {"causal": causal, "sink": sink, "return_lse": True, "backend": backend}
    dense = tm.attention(q, k, v, **options)
    close(ours, dense)
    close(gradients(ours, leaves), gradients(dense, leaves))


@each_backend
def test_last_keys_alone_are_a_window(backend):
    args, kwargs = drawn(backend, sq=40, sk=60, entries=0, causal=True, num_recent=9)
    q, k, v = leaves_of(args)
    ours = run(backend, (q, k, v, *args[3:]), kwargs)
    window = tm.attention(q, k, v, window=(8, 0), return_lse=True, backend=backend)
    close(ours, window)
    close(gradients(ours, (q, k, v)), gradients(window, (q, k, v)))


@each_backend
@pytest.mark.parametrize("num_sink", [0, 5, 16, 100])
@pytest.mark.parametrize("num_recent", [0, 1, 23, 100])
def test_keys_seen_twice_count_once(backend, num_sink, num_recent):
    """The list adds all keys that the first and last keys do not cover."""
    args, kwargs = drawn(backend, sq=40, sk=60, block_k=4, causal=True)
    q, k, v = args[:3]
    lists = full_lists(q, k, 16, 4)
    want = run(backend, (q, k, v, *lists), kwargs)
    options = {"num_sink": num_sink, "num_recent": num_recent}
    close(run(backend, (q, k, v, *lists), kwargs, **options), want)


@each_backend
def test_lists_of_blocks_are_lists_of_keys(backend):
    args, kwargs = drawn(backend, block_k=8, entries=4)
    keys = (args[3][..., None] * 8 + torch.arange(8, device=args[3].device)).flatten(-2).int()
    want = run(backend, args, kwargs)
    close(run(backend, (*args[:3], keys, args[4] * 8), kwargs, block_k=1), want)


@each_backend
def test_kinds_of_lists_agree(backend):
    """One list for all heads, copied per KV head, and copied per query head, give the same
    result."""
    args, kwargs = drawn(backend, lists=1, causal=True, num_sink=2)
    q, k, v = leaves_of(args)
    indices, counts = args[3:]
    kinds = []
    for heads in (1, 2, 4):
        lists = indices.expand(-1, heads, -1, -1), counts.expand(-1, heads, -1)
        results = run(backend, (q, k, v, *lists), kwargs)
        kinds.append((*results, *gradients(results, (q, k, v))))
    for kind in kinds[1:]:
        close(kind, kinds[0])


@each_backend
def test_parts_of_lists_merge(backend):
    args, kwargs = drawn(backend, entries=5, b=1)
    odd = torch.arange(5, device=args[3].device) % 2 == 1
    parts = []
    for keep in (odd, ~odd):
        kept = torch.where(keep, args[3], -1)  # -1 is skipped in any place
        parts.append(run(backend, (*args[:3], kept, args[4]), kwargs))
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    close(tm.merge_attention_states(outs, lses, backend="reference"), run(backend, args, kwargs))


@each_backend
def test_rows_of_lists_do_not_see_each_other(backend):
    """Each block of queries gives the same result when called separately."""
    args, kwargs = drawn(backend, sq=64, block_q=16)
    q, k, v, indices, counts = args
    out, lse = run(backend, args, kwargs)
    for r in range(4):
        at = slice(16 * r, 16 * r + 16)
        one = (q[:, at], k, v, indices[:, :, r : r + 1], counts[:, :, r : r + 1])
        close(run(backend, one, kwargs), (out[:, at], lse[..., at]))


# --- what must not be read, and what must be written --------------------------------------------


@each_kernel
@each_dtype
def test_keys_that_nobody_sees_are_not_read(backend, dtype):
    args, kwargs = drawn(backend, dtype, sk=160, entries=2, block_k=16, num_sink=3, causal=True)
    q, k, v = leaves_of(args)
    results = run(backend, (q, k, v, *args[3:]), kwargs)
    want = gradients(results, (q, k, v))
    unseen = (want[1] == 0).all(-1) & (want[2] == 0).all(-1)
    assert unseen.any()
    k2, v2 = (torch.where(unseen[..., None], NAN, t).detach().requires_grad_() for t in (k, v))
    spoiled = run(backend, (q, k2, v2, *args[3:]), kwargs)
    for a, b in zip(spoiled, results, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(spoiled, (q, k2, v2)), want, strict=True):
        assert torch.equal(a, b)


@each_backend
def test_rows_without_keys(backend):
    args, kwargs = drawn(backend, entries=3)
    args[4][:, :, 1] = 0
    q, k, v = leaves_of(args)
    out, lse = run(backend, (q, k, v, *args[3:]), kwargs)
    assert (out[:, 16:32] == 0).all() and (lse[:, :, 16:32] == -float("inf")).all()
    dq = gradients((out, lse), (q, k, v))[0]
    assert (dq[:, 16:32] == 0).all() and (dq[:, :16] != 0).any()


@each_backend
def test_a_nan_stays_in_its_row(backend):
    args, kwargs = drawn(backend, causal=True, num_recent=5)
    want = run(backend, args, kwargs)
    args[0][0, 20, 1] = NAN
    got = run(backend, args, kwargs)
    for a, b, row in ((got[0], want[0], (0, 20, 1)), (got[1], want[1], (0, 1, 20))):
        assert torch.isnan(a[row]).all()
        a[row] = b[row] = 0
        assert torch.equal(a, b)


# --- transpose_block_list -----------------------------------------------------------------------


@each_backend
def test_transposed_lists_hold_the_same_pairs(backend):
    args, _ = drawn(backend, sq=300, sk=200, block_q=4, block_k=8, entries=9, hostile=True)
    indices, counts = args[3:]
    blocks = 25
    offsets, rows = tm.transpose_block_list(indices, counts, blocks, backend=backend)
    for b, h in ((0, 0), (1, 1)):
        pairs = []
        for r, (ids, count) in enumerate(
            zip(indices[b, h].tolist(), counts[b, h].tolist(), strict=True)
        ):
            largest = -1
            for i in ids[: max(count, 0)]:
                if i > largest and i < blocks:
                    pairs.append((i, r))
                largest = max(largest, i)
        ends, listed = offsets[b, h].tolist(), rows[b, h].tolist()
        found = [(j, r) for j in range(blocks) for r in listed[ends[j] : ends[j + 1]]]
        assert found == sorted(pairs)
        assert listed[ends[-1] :] == [-1] * (len(listed) - ends[-1])


# --- mass ---------------------------------------------------------------------------------------


@each_backend
def test_mass_of_listed_keys_is_their_weight(backend):
    """Covers each head, by lists expanded to all heads, and the sum over heads that share a
    list."""
    args, kwargs = drawn(
        backend, sq=3, sk=5, b=1, lists=1, block_q=1, block_k=1, causal=True, sink=True
    )
    q, k, v = args[:3]
    indices, counts = full_lists(q, k, 1, 1)
    z = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * q.shape[-1] ** -0.5
    later = torch.ones(z.shape[2:], dtype=torch.bool, device=z.device).triu(3)
    sink = kwargs["sink"][:, None, None].expand(*z.shape[:3], 1)
    want = torch.cat([z.masked_fill(later, -INF), sink], -1).softmax(-1)[..., :-1]
    for lists in (1, 2, 4):
        own = indices.expand(-1, lists, -1, -1), counts.expand(-1, lists, -1)
        *plain, mass = run(backend, (q, k, v, *own), kwargs, return_mass=True)
        close([mass], [want.unflatten(1, (lists, -1)).sum(2)])
    for a, b in zip(plain, run(backend, (q, k, v, *own), kwargs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("backend", "isa"), [v for v in cpu_variants() if v[0] == "cpu"], indirect=["isa"]
)
def test_many_equal_weights_add_up(backend, isa):
    """224 rows of weight 1 / n per key: rounding is the same in every sum."""
    q, k = torch.ones(1, 64, 7, 1), torch.ones(1, 16, 1, 1)
    ids = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    counts = torch.ones(1, 1, 2, dtype=torch.int32)
    for n in (3, 5, 7):
        *_, mass = tm.block_sparse_attention(
            q, k, k, ids, counts, block_q=32, block_k=16, return_lse=True, return_mass=True,
            seqlens_k=torch.tensor([n], dtype=torch.int32), backend=backend,
        )  # fmt: skip
        assert tm.testing.error(mass, torch.full_like(mass, 224.0)) <= 1e-6


@each_backend
def test_mass_counts_what_an_entry_adds(backend):
    """First and last keys, a repeated id and entries beyond the count have no mass."""
    args, kwargs = drawn(backend, sq=16, sk=48, b=1, h=1, hk=1, lists=1, block_k=4, entries=1)
    ids = torch.tensor([0, 2, 2, 1, 4, 8, 12, 99, 5], device=args[0].device, dtype=torch.int32)
    lists = ids.view(1, 1, 1, 9), torch.full((1, 1, 1), 8, dtype=torch.int32, device=ids.device)
    options = {"causal": True, "num_sink": 4, "num_recent": 9, "return_mass": True}
    _, lse, mass = run(backend, (*args[:3], *lists), kwargs, **options)
    assert (mass[0, 0, 0, [0, 2, 3, 6, 7, 8]] == 0).all()
    assert (mass[0, 0, 0, [1, 4]] > 0).all()
    listed = mass.sum()
    ends = run(backend, (*args[:3], lists[0], lists[1] * 0), kwargs, **options)
    torch.testing.assert_close(listed, (1 - (ends[1] - lse).exp()).sum())
    q = args[0].requires_grad_()
    results = run(backend, (q, *args[1:3], *lists), kwargs, **options)
    assert [r.requires_grad for r in results] == [True, True, False]


# --- pages --------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("block_q, block_k, page", [(16, 8, 4), (1, 1, 16)])
def test_pages_are_the_keys_that_they_hold(backend, block_q, block_k, page):
    """Paged keys give the bits of dense keys, for any contents of unused pages."""
    lengths = torch.tensor([45, 0, 17], dtype=torch.int32)
    args, kwargs = drawn(
        backend, sq=12 if block_q > 1 else 3, sk=48, b=3, block_q=block_q, block_k=block_k, lists=1,
        entries=5, sink=True, causal=True, num_sink=2, num_recent=3, page=page, seqlens_k=lengths,
    )  # fmt: skip
    q, k, v, *lists = args
    table = kwargs.pop("block_table")
    dense = [x[table.long()].flatten(1, 2) for x in (k, v)]
    unused = torch.ones(len(k), dtype=torch.bool, device=k.device)
    for b, n in enumerate(lengths.tolist()):
        unused[table[b, : -(-n // page)].long()] = False
        table[b, -(-n // page) :] = -7 if backend != "reference" else 0
    k[unused] = v[unused] = NAN
    # Adjacent pages, alternating between keys and values.
    both = torch.stack([k, v], 1)
    options = {"return_mass": True}
    want = run(backend, (q, *dense, *lists), kwargs, **options)
    got = run(backend, (q, *both.unbind(1), *lists), kwargs, **options, block_table=table)
    assert_same(got, want, backend)


@each_backend
def test_pages_must_be_there_and_have_no_gradient(backend):
    args, kwargs = drawn(
        backend, sq=4, sk=16, b=2, entries=1, page=8, seqlens_k=torch.tensor([16, 3]).int()
    )
    table = kwargs["block_table"]
    with pytest.raises(RuntimeError, match="seqlens_k: must be given with block_table; got None"):
        run(backend, args, kwargs, seqlens_k=None)
    with pytest.raises(RuntimeError, match="k: must have pages of a power of two of tokens; got 7"):
        run(backend, (args[0], args[1][:, :7], args[2][:, :7], *args[3:]), kwargs)
    with pytest.raises(RuntimeError, match=r"block_table: must have the batch size of q, 2; got 1"):
        run(backend, args, kwargs, block_table=table[:1])
    with pytest.raises(RuntimeError, match="k: must not require a gradient, there is none with bl"):
        run(backend, (args[0], args[1].requires_grad_(), *args[2:]), kwargs)
    args[1].requires_grad_(False)
    if backend in ("reference", "cpu"):
        with pytest.raises(RuntimeError, match="block_table: must hold pages below 4 up to the le"):
            run(backend, args, kwargs, block_table=table + 4)
