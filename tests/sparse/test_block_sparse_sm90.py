"""The sm_90a forward of block_sparse_attention on the PTX machine."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import BF16, F16, INF, NAN, PACKED, PACKED_KEYS, drawn_sm90, full_lists
from conftest import backends
from sm90 import check_every_order, check_explained, hopper

import tokenmill as tm
from tokenmill import _emulator

pytestmark = pytest.mark.skipif("emulated" not in backends(), reason="not a development build")

KERNEL = "block_sparse_forward_sm90_kernel"


def run(args, kwargs, backend="emulated", **changes):
    return tm.block_sparse_attention(*args, **kwargs | changes, backend=backend)


def check_budget(args, kwargs):
    """Compares with float64 within the error budget; returns the results."""
    with hopper(), _emulator.counting() as launches:
        found = run(args, kwargs)
    assert KERNEL in launches[0]["kernel"]
    wide, plain = (
        run([*(x.to(dtype) for x in args[:3]), *args[3:]], kwargs, "reference")
        for dtype in (torch.float64, args[0].dtype)
    )
    for i, (actual, oracle, eager) in enumerate(zip(found, wide, plain, strict=True)):
        assert torch.equal(actual.isinf(), oracle.isinf())
        finite = oracle.isfinite()
        parts = (x[finite] for x in (actual, oracle, eager))
        tm.testing.assert_accurate(*parts, name=f"result {i}")
    return found


CASES = {
    "ragged": {"sq": 130, "sk": 300, "entries": 4},
    "two units of a group, rows that see nothing": {
        "sq": 130, "sk": 100, "h": 2, "causal": True, "entries": 2,
    },
    "three units, first and last keys": {
        "sq": 100, "sk": 330, "h": 3, "causal": True, "num_sink": 70, "num_recent": 100,
        "entries": 3, "dtype": BF16,
    },
    "blocks of 128 of four heads, wide": {
        "sq": 200, "sk": 300, "h": 4, "d": 128, "block_q": 128, "block_k": 128, "causal": True,
        "num_recent": 40, "entries": 3,
    },
    "lists of query heads, wide, softcap": {
        "sq": 70, "sk": 200, "h": 2, "lists": 2, "d": 128, "softcap": 2.0, "scale": 1.0,
        "block_k": 128, "entries": 2, "dtype": BF16,
    },
    "lengths, sink": {
        "sq": 40, "sk": 200, "b": 3, "h": 2, "hk": 2, "entries": 3, "sink": True,
        "seqlens_k": torch.tensor([0, 150, 500], dtype=torch.int32), "return_mass": True,
    },
    "shared list, causal lengths": {
        "sq": 64, "sk": 200, "b": 2, "h": 2, "hk": 2, "entries": 3, "causal": True, "num_sink": 9,
        "seqlens_k": torch.tensor([30, 150], dtype=torch.int32),
    },
    "more recent keys than there are": {
        "sq": 40, "sk": 100, "causal": True, "num_recent": 120, "num_sink": 20, "entries": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_results_keep_the_budget(name):
    check_budget(*drawn_sm90(**CASES[name]))


@pytest.mark.parametrize("seed", range(3))
def test_hostile_lists(seed):
    """Lists have repeated, unordered or invalid ids, and more entries than a warp reads at once."""
    check_budget(
        *drawn_sm90(seed=seed, sq=130, sk=150, entries=40, hostile=True, num_sink=seed * 40)
    )


def test_an_empty_list_leaves_rows_empty():
    args, kwargs = drawn_sm90(sq=100, sk=100, entries=2)
    args[4][:] = torch.tensor([0, 2])
    with hopper():
        out, lse = run(args, kwargs)
    assert (out[:, :64] == 0).all() and (lse[..., :64] == -INF).all()
    assert lse[..., 64:].isfinite().all()


@pytest.mark.parametrize("d", [64, 128])
def test_every_order_of_events_gives_the_same_bits(d):
    """There are more key tiles than pipeline stages."""
    args, kwargs = drawn_sm90(
        sq=64, sk=448, h=2, d=d, entries=7, causal=True, num_sink=64, num_recent=70
    )
    check_every_order(lambda: run(args, kwargs))


@pytest.mark.parametrize(
    "options",
    [PACKED_KEYS, PACKED | {"seqlens_k": torch.tensor([60, 0, 150, 90], dtype=torch.int32)}],
    ids=["packed keys", "padded keys"],
)
def test_packed_requests(options):
    """Requests end inside tiles; one is empty, one fills its tile."""
    check_budget(*drawn_sm90(h=2, causal=True, num_recent=10, **options))


def test_a_packed_request_has_the_bits_that_it_has_alone():
    (q, k, v, indices, counts), kwargs = drawn_sm90(**PACKED_KEYS)
    cu_q, cu_k = kwargs.pop("cu_seqlens_q"), kwargs.pop("cu_seqlens_k")
    rows = slice(134 // 64 + 3, 134 // 64 + 6)  # list rows of the last request
    with hopper():
        out, lse = run((q, k, v, indices, counts), kwargs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        alone = (q[134:290], k[300:340], v[300:340], indices[:, rows], counts[:, rows])
        wanted = run([x[None] for x in alone], kwargs)
    assert torch.equal(out[134:], wanted[0][0]) and torch.equal(lse[:, 134:], wanted[1][0])


def test_rows_without_a_request():
    (q, k, v, *_), kwargs = drawn_sm90(sq=300, sk=300, entries=4)
    inner = torch.tensor([5, 100, 250], dtype=torch.int32)
    lists = torch.zeros(1, 300 // 64 + 2, 4, dtype=torch.int32)
    with hopper():
        out, lse = run(
            (q[0], k[0], v[0], lists, torch.ones_like(lists[..., 0])),
            kwargs, cu_seqlens_q=inner, cu_seqlens_k=inner,
        )  # fmt: skip
    outside = [*range(5), *range(250, 300)]
    assert (out[outside] == 0).all() and (lse[:, outside] == -INF).all()
    assert lse[:, 5:250].isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF])
def test_keys_that_nobody_sees_touch_no_row(value):
    """These keys lie after the request's last key, or are masked from causal rows."""
    options = {"sq": 64, "sk": 192, "h": 2, "entries": 3, "causal": True}
    args, kwargs = drawn_sm90(seqlens_k=torch.tensor([130], dtype=torch.int32), **options)
    args[3][:], args[4][:] = torch.arange(3), 3
    with hopper():
        clean = run(args, kwargs)
        args[1][:, 110:, :, ::3] = NAN
        args[2][:, 110:, :, ::3] = args[2][:, 120:, :, 1] = value
        found = run(args, kwargs)
    sees_none = 110 - (130 - 64)
    for a, b in zip(clean, found, strict=True):
        dim = 1 if a.dim() == 4 else 2
        assert torch.equal(a.narrow(dim, 0, sees_none), b.narrow(dim, 0, sees_none))
    assert not found[0][:, sees_none:, :, ::3].isfinite().any()


def test_values_that_are_not_finite_show_where_they_are_seen():
    args, kwargs = drawn_sm90(sq=100, sk=100, entries=2, causal=True)
    args[4][:] = 2
    args[3][:] = torch.tensor([0, 1])
    args[2][:, 5, :, 7] = args[2][:, 80, :, 9] = INF
    args[2][:, 90, :, 7] = -INF
    with hopper():
        out, _ = run(args, kwargs)
    wanted, _ = run(args, kwargs, "reference")
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())


def test_full_lists_are_dense_attention():
    q, k, v = drawn_sm90(sq=100, sk=230, h=2, d=128)[0][:3]
    lists = full_lists(q, k, 64, 64)
    with hopper():
        found = tm.block_sparse_attention(
            q, k, v, *lists, block_q=64, block_k=64, causal=True, backend="emulated"
        )
        wanted = tm.attention(q, k, v, causal=True, backend="emulated")
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_results_agree_with_the_kernel_of_every_chip():
    args, kwargs = drawn_sm90(
        sq=130, sk=200, h=4, hk=2, lists=2, entries=3, causal=True, num_recent=9
    )
    with hopper():
        found = run(args, kwargs)
    for a, b in zip(found, run(args, kwargs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_strides_and_out():
    """q, k and v in one projection, and heads before tokens."""
    args, kwargs = drawn_sm90(sq=70, sk=70, h=2, hk=2, entries=2, b=2)
    packed = torch.stack(args[:3], 2)
    wide = [*packed.unbind(2), *args[3:]]
    kwargs.pop("return_lse")
    out = torch.full((2, 2, 70, 64), NAN, dtype=F16).transpose(1, 2)
    with hopper(), _emulator.counting() as launches:
        found = run(wide, kwargs, out=out)
        wanted = run(args, kwargs)
    assert all(KERNEL in launch["kernel"] for launch in launches)
    assert found is out and torch.equal(out, wanted)


def test_tiles_that_nobody_sees_are_not_loaded():
    """Causal rows of two blocks, whose lists name all keys."""
    args, kwargs = drawn_sm90(sq=128, sk=128, entries=2, causal=True)
    args[3][:], args[4][:] = torch.tensor([0, 1]), 2
    with _emulator.configured("device=sm_90a"), _emulator.counting() as launches:
        run(args, kwargs)
    (launch,) = launches
    assert launch["wgmma"]["b_bytes"] == 3 * 2 * 64 * 64 * 2
    assert launch["shared"]["bulk"]["bytes"] == (2 * 2 + 3 * 2) * 64 * 64 * 2  # Q, O; K, V


def test_blocks_of_threads_without_queries_load_nothing():
    """Two queries follow a block of 128: only units of their first half have queries."""
    args, kwargs = drawn_sm90(sq=130, sk=64, h=4, block_q=128, entries=1)
    args[3][:], args[4][:] = 0, 1
    with _emulator.configured("device=sm_90a"), _emulator.counting() as launches:
        run(args, kwargs)
    (launch,) = launches
    boxes = (8 + 4) * 2 + (3 + 2) * 2  # Q and O of 12 units; K and V of 5 blocks
    assert launch["shared"]["bulk"]["bytes"] == boxes * 64 * 64 * 2


TAKEN = {
    "": {},
    "q: must be float16 or bfloat16": {"dtype": torch.float32},
    "q: must have head_dim 64 or 128": {"d": 80},
    "v: must have the head_dim of q": {"dv": 128},
    "block_q: must be 64 or more; got 32": {"block_q": 32},
    "block_k: must be 64 or more; got 16": {"block_k": 16},
    "block_table: must be None": {
        "page": 64, "seqlens_k": torch.tensor([50], dtype=torch.int32),
    },
    "scale: must be 2^-126 or more in float32; got -1.0": {"scale": -1.0},
    "softcap: must be below 1e38 and at most 2^64 scale; got 3e+38": {"softcap": 3e38},
    "q: must have 32 tokens for each sequence; got 31": {"sq": 31},
}  # fmt: skip


@pytest.mark.parametrize("why", TAKEN)
def test_explain_names_the_kernel_that_runs(why):
    args, kwargs = drawn_sm90(**{"sq": 32, "sk": 64, "entries": 1} | TAKEN[why])
    check_explanation(why, args, kwargs)


def check_explanation(why, args, kwargs):
    kwargs = kwargs | {"return_lse": False}
    found = check_explained("block_sparse_attention", why, *args, **kwargs)
    kwargs.pop("out", None)
    torch.testing.assert_close(found, run(args, kwargs, "reference"), rtol=1e-2, atol=1e-2)


def test_explain_knows_layouts():
    args, kwargs = drawn_sm90(sq=64, sk=64, h=2, hk=2, entries=1)
    padded = torch.empty(1, 64, 2, 68, dtype=F16)[..., :64].copy_(args[2])
    strides = "must have strides that are multiples of 8, of 64 or more; got "
    check_explanation(f"v: {strides}(8704, 136, 68, 1)", [*args[:2], padded, *args[3:]], kwargs)
    check_explanation(f"out: {strides}(8704, 136, 68, 1)", args, kwargs | {"out": padded})
