"""The sm_90a forward of requests with a cache, on the PTX machine."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import backends
from sm90 import MODES, hopper

import tokenmill as tm
from tokenmill import _emulator
from tokenmill.dense.attention_decode_cases import decode_call

pytestmark = pytest.mark.skipif("emulated" not in backends(), reason="not a development build")

F16, BF16 = torch.float16, torch.bfloat16
INF = float("inf")
SM90 = "attention_forward_sm90_kernel"


def drawn(lengths, *, dtype=F16, **options):
    g = torch.Generator().manual_seed(0)
    shape = {"h": 2, "hk": 1, "d": 64, "capacity": 256} | options
    args, kwargs = decode_call(lengths, dv=shape["d"], **shape)(dtype, g)
    kwargs.pop("return_lse", None)
    return args, kwargs


def run(args, kwargs, mode=MODES[0]):
    """Returns out, lse or None, and the kernels that ran."""
    softmax = kwargs.get("kind", "softmax") == "softmax"
    with hopper(mode), _emulator.counting() as launches:
        found = tm.attention(*args, **kwargs, return_lse=softmax, backend="emulated")
    out, lse = found if softmax else (found, None)
    return out, lse, [launch["kernel"] for launch in launches]


def check_budget(args, kwargs):
    out, lse, kernels = run(args, kwargs)
    assert SM90 in kernels[0]
    options = kwargs | {"return_lse": lse is not None, "backend": "reference"}
    wide, plain = (
        tm.attention(*(x.to(dtype) for x in args), **options)
        for dtype in (torch.float64, args[0].dtype)
    )
    if lse is None:
        return tm.testing.assert_accurate(out, wide, plain)
    assert torch.equal(lse.isinf(), wide[1].isinf())
    for actual, oracle, eager in zip((out, lse), wide, plain, strict=True):
        finite = oracle.isfinite()
        tm.testing.assert_accurate(actual[finite], oracle[finite], eager[finite])


# Lengths end in the first page of a tile, in its second page, at its end, or are 0.
CASES = {
    "pages of half a tile": ((200, 130), {"page_size": 64, "queries": (70, 33)}, {"causal": True}),
    "pages of a tile": ((129, 0), {"page_size": 128, "sq": 33, "d": 128}, {}),
    "pages of two tiles": (
        (256, 40),
        {"page_size": 256, "sq": 64, "capacity": 512, "dtype": BF16},
        {"window": (90, 20), "sink": torch.tensor([0.5, -1.0])},
    ),
    "no pages": ((140, 200), {"queries": (40, 32), "capacity": 200}, {"causal": True}),
    "sigmoid": (
        (192, 100),
        {"page_size": 64, "sq": 40, "hk": 2},
        {"kind": "sigmoid", "score_bias": "neg_log_n"},
    ),
    "sigmoid, wide": (
        (190,),
        {"page_size": 64, "queries": (66,), "d": 128, "dtype": BF16},
        {"kind": "sigmoid", "causal": True},
    ),
    "tiles of 128, columns behind the last": (
        (150,),
        {"page_size": 64, "queries": (33,), "h": 1, "d": 96, "dtype": BF16},
        {"causal": True},
    ),
    "tiles of 96 in boxes of 32": (
        (230, 97),
        {"page_size": 64, "queries": (40, 33), "h": 1, "d": 192},
        {"causal": True},
    ),
    "tiles of 96, no pages": ((190,), {"sq": 32, "h": 1, "d": 192, "capacity": 200}, {}),
    "tiles of 64": (
        (130, 70),
        {"page_size": 128, "queries": (32, 1), "h": 1, "d": 256},
        {"kind": "sigmoid", "window": (80, 3)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_results_keep_the_budget(name):
    lengths, shape, options = CASES[name]
    args, kwargs = drawn(lengths, **shape)
    check_budget(args, kwargs | options)


def test_every_order_of_events_gives_the_same_bits():
    """Keys of all pages span more tiles than there are pipeline stages."""
    args, kwargs = drawn((600,), page_size=64, queries=(33,), h=1, capacity=640)
    out, lse, _ = run(args, kwargs)
    for mode in MODES[1:]:
        again, again_lse, _ = run(args, kwargs, mode)
        assert torch.equal(out, again) and torch.equal(lse, again_lse)


def test_a_request_has_the_bits_that_it_has_alone():
    """Requests with few queries use another kernel; they come first, last, or have no query. The
    last ones follow more requests than a warp has lanes."""
    short = (9,) * 40, (0,) * 40
    lengths, queries = (90, 200, *short[0], 77, 64, 130), (1, 70, *short[1], 0, 31, 32)
    args, kwargs = drawn(lengths, page_size=64, queries=queries)
    out, lse, kernels = run(args, kwargs)
    assert len(kernels) == 2 and SM90 in kernels[0] and "sm90" not in kernels[1]
    ends = [0, *itertools.accumulate(queries)]
    for b, rows in enumerate(slice(*pair) for pair in itertools.pairwise(ends)):
        if queries[b] == 0:
            continue
        own = {name: kwargs[name][b : b + 1] for name in ("seqlens_k", "block_table")}
        own["cu_seqlens_q"] = torch.tensor([0, queries[b]], dtype=torch.int32)
        alone, alone_lse, kernels = run((args[0][rows], *args[1:]), own)
        assert (SM90 in kernels[0]) == (queries[b] >= 32)
        assert torch.equal(out[rows], alone) and torch.equal(lse[:, rows], alone_lse), b


def test_short_requests_have_no_tiles_of_the_first_launch():
    """Requests with few queries take no tiles of the first launch, which is omitted if the host
    knows that all are short."""
    args, kwargs = drawn((9,) * 64, page_size=64, queries=(1,) * 64, capacity=64)
    found, counts = [], []
    for maximum in (None, 1):
        with hopper(), _emulator.counting() as launches:
            options = kwargs | {"max_seqlen_q": maximum, "backend": "emulated"}
            found.append(tm.attention(*args, **options))
        counts.append([(SM90 in x["kernel"], x["instructions"]) for x in launches])
    (first, rest), (alone,) = counts
    assert first[0] and not rest[0] and not alone[0]
    assert first[1] < 20_000  # tiles per head: 2, and one for rows without a request
    assert torch.equal(*found)


def test_requests_share_pages():
    """Two requests share their first page; the block_table lists pages in any order."""
    (q, k, v), kwargs = drawn((256, 256), page_size=64, sq=32)
    table = torch.tensor([[3, 0, 7, 1], [3, 8, 0, 5]], dtype=torch.int32)
    k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    check_budget((q, k, v), {"seqlens_k": kwargs["seqlens_k"], "block_table": table})


def test_no_start_length_or_page_reaches_beyond_its_tensor():
    """A GPU cannot check lengths, starts and pages, so they are clamped; tokens of no request are
    empty rows."""
    (q, k, v), kwargs = drawn((256, 256, 256), page_size=64, queries=(40, 3, 39))
    k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    maximum, minimum = 2**31 - 1, -(2**31)
    table = kwargs["block_table"].clone()
    table[0, ::2], table[2, 1] = maximum, minimum
    kwargs |= {
        "seqlens_k": torch.tensor([maximum, minimum, 300], dtype=torch.int32),
        "block_table": table,
        "cu_seqlens_q": torch.tensor([2, 40, 43, 80], dtype=torch.int32),
    }
    out, lse, _ = run((q, k, v), kwargs)
    empty = torch.ones(82, dtype=torch.bool)
    empty[2:40] = empty[43:80] = False
    assert (out[empty] == 0).all() and (lse[:, empty] == -INF).all()
    table = table.where((table >= 0) & (table < k.shape[0]), 0)
    wanted = tm.attention(
        q[2:80], k, v, backend="reference", block_table=table,
        seqlens_k=torch.tensor([256, 0, 256], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 38, 41, 78], dtype=torch.int32),
    )  # fmt: skip
    torch.testing.assert_close(out[2:80], wanted, rtol=1e-2, atol=1e-2)
    kwargs["cu_seqlens_q"] = torch.tensor([minimum, maximum, -5, maximum], dtype=torch.int32)
    assert run((q, k, v), kwargs)[0].isfinite().all()


def check_explanation(why, args, kwargs, name="attention"):
    """Asserts that the kernel that runs is the one that explain names."""
    function = getattr(tm, name)
    with _emulator.configured("device=sm_90a"), _emulator.counting() as launches:
        kernel = tm.explain(name, *args, **kwargs, backend="emulated").kernel
        function(*args, **kwargs, backend="emulated")
    takes = any("sm90" in launch["kernel"] for launch in launches)
    assert takes == kernel.startswith("csrc/dense/attention/kernel_sm90") == (why == "")
    assert takes or f"csrc/dense/attention_decode (not kernel_sm90: {why}" in kernel


def test_explain_names_the_kernel_that_runs():
    args, kwargs = drawn((70, 64), page_size=64, sq=32, h=1, capacity=128)
    check_explanation("", args, kwargs)
    check_explanation("kind: must be 'softmax'", args, kwargs | {"kind": "relu"})
    check_explanation("scale: must be 2^-126", args, kwargs | {"scale": -1.0})
    q, k, v = args
    check_explanation("q: must have 32 tokens; got 31", (q[:, :31], k, v), kwargs)
    flat = torch.arange(4, dtype=torch.int32).view(2, 2)
    small = [c[:2].reshape(4, 32, 1, 64) for c in (k, v)]
    rule = "k_cache: must have pages of 64 tokens or more; got 32"
    check_explanation(rule, (q, *small), kwargs | {"block_table": flat})
    args, kwargs = drawn((70,), page_size=64, sq=32, h=1, capacity=128, float8=(None, None))
    check_explanation("k_cache: must have the dtype of q", args, kwargs)
    args, kwargs = drawn((70, 9), page_size=64, queries=(32, 1), h=1, capacity=128)
    check_explanation("", args, kwargs)
    check_explanation("", args, kwargs | {"max_seqlen_q": 32})
    with _emulator.configured("device=sm_90a"):
        kernel = tm.explain("attention", *args, **kwargs, backend="emulated").kernel
    assert "and csrc/dense/attention_decode for requests with fewer than 32 queries in" in kernel


def test_explain_knows_a_bound_on_queries():
    args, kwargs = drawn((70, 9), page_size=64, queries=(31, 1), h=1, capacity=128)
    rule = "max_seqlen_q: must be 32 or more; got 31"
    check_explanation(rule, args, kwargs | {"max_seqlen_q": 31})


def test_causal_calls_of_decode_have_it_where_tiles_fill_a_gpu():
    (q, k, v), kwargs = drawn((33,), page_size=64, sq=32, h=256, hk=1, capacity=64)
    check_explanation("", (q, k, v), kwargs, "attention_decode")
    rule = "q: must have 256 tiles of 64 rows; got 4"
    check_explanation(rule, (q[:, :, :4], k, v), kwargs, "attention_decode")
    with _emulator.configured("device=sm_90a"):
        options = kwargs | {"num_splits": 1, "schedule": "split", "backend": "emulated"}
        kernel = tm.explain("attention_decode", q, k, v, **options).kernel
    rules = (
        "num_splits: must be 0; got 1; schedule: must be 'auto' or 'stream_k'; got split; "
        "q: must have at most 64 queries times heads of a KV head, or what the forward asks; "
        "got 8192"
    )
    assert f"(not kernel_sm90: {rules})" in kernel
