"""The sm_90a decode kernel on the PTX machine."""

from __future__ import annotations

import pytest
import torch
from conftest import backends
from sm90 import check_every_order, check_explained, hopper

import tokenmill as tm
from tokenmill import _emulator
from tokenmill.dense.attention_decode_cases import decode_call

pytestmark = pytest.mark.skipif("emulated" not in backends(), reason="not a development build")

F16, BF16 = torch.float16, torch.bfloat16
INF, NAN = float("inf"), float("nan")
KERNEL = "attention_decode_sm90_kernel"


def drawn(lengths, *, dtype=F16, **options):
    """Places NaN after the last key of each request."""
    g = torch.Generator().manual_seed(0)
    shape = {"h": 4, "hk": 1, "d": 64, "capacity": 256} | options
    args, kwargs = decode_call(lengths, dv=shape["d"], **shape)(dtype, g)
    kwargs.pop("return_lse", None)
    return args, kwargs


def run(args, kwargs):
    """Returns out, and lse for softmax."""
    softmax = kwargs.get("kind", "softmax") == "softmax"
    with hopper(), _emulator.counting() as launches:
        found = tm.attention_decode(*args, **kwargs, return_lse=softmax, backend="emulated")
    assert [KERNEL in launch["kernel"] for launch in launches] == [True]
    return found if softmax else (found,)


def check_budget(args, kwargs):
    found = run(args, kwargs)
    options = kwargs | {"return_lse": len(found) == 2, "backend": "reference"}
    wide, plain = (
        tm.attention_decode(*(x.to(dtype) for x in args), **options)
        for dtype in (torch.float64, args[0].dtype)
    )
    if len(found) == 1:
        wide, plain = (wide,), (plain,)
    for actual, oracle, eager in zip(found, wide, plain, strict=True):
        finite = oracle.isfinite()
        assert torch.equal(actual.isfinite(), finite)
        tm.testing.assert_accurate(actual[finite], oracle[finite], eager[finite])


def splits(count):
    return {"num_splits": count, "schedule": "split"}


# Lengths around a tile of 64 keys; rows per KV head: queries times the GQA group size.
CASES = {
    "8 rows, dense, several requests a block": (
        (0, 1, 63, 64) * 4 + (65,),
        {"h": 8, "capacity": 65},
        {},
    ),
    "1 row, pages, splits": (
        (250, 9),
        {"h": 2, "hk": 2, "d": 128, "dtype": BF16, "page_size": 64},
        splits(3),
    ),
    "stages in turn, 64": ((900,), {"capacity": 900}, splits(1)),
    "stages in turn, 128": (
        (900,),
        {"d": 128, "sq": 2, "page_size": 64, "capacity": 960},
        splits(1),
    ),
    "64 rows": ((200, 70), {"sq": 16, "page_size": 128}, splits(2)),
    "more queries than keys": ((5, 130), {"sq": 12, "h": 5, "capacity": 130}, splits(2)),
    "every term": (
        (230, 100, 20),
        {"sq": 7, "h": 6, "hk": 2, "d": 128, "page_size": 64},
        {
            "window": (70, 0),
            "softcap": 3.0,
            "score_bias": torch.tensor([0.5, -1.0, 2.0, 0.0, -3.0, 1.0]),
            "sink": torch.tensor([0.5, -1.0, 2.0, 0.0, -INF, 9.0]),
        },
    ),
    "sigmoid": (
        (200, 65),
        {"sq": 2, "dtype": BF16, "page_size": 64},
        {"kind": "sigmoid", "score_bias": torch.tensor([0.5, -1.0, -9.0, 3.0])} | splits(2),
    ),
    "sigmoid, wide, window": (
        (150, 0, 40),
        {"sq": 3, "h": 3, "d": 128, "capacity": 150},
        {"kind": "sigmoid", "score_bias": "neg_log_n", "window": (50, 0)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_results_keep_the_budget(name):
    lengths, shape, options = CASES[name]
    args, kwargs = drawn(lengths, **shape)
    check_budget(args, kwargs | options)


@pytest.mark.parametrize("options", [{}, splits(2)])
def test_every_order_of_events_gives_the_same_bits(options):
    """More tiles than pipeline stages, several requests per CTA, and values that one query does not
    see."""
    lengths = (300, 65, 20)
    (q, k, v), kwargs = drawn(lengths, d=128, sq=2, page_size=64, capacity=320)
    last = kwargs["block_table"][0, 4], 300 % 64 - 1
    v[last] = INF
    kwargs |= options | {"window": (250, 0)}
    run((q, k, v), kwargs)
    kwargs |= {"return_lse": True, "backend": "emulated"}
    check_every_order(lambda: tm.attention_decode(q, k, v, **kwargs))


@pytest.mark.parametrize("count", [1, 2])
def test_parts_of_large_logits_are_merged_exactly(count):
    """The logits 2^22 and 2^22 + 1 are in parts of one key tile each: one ulp of row_max is half an
    exponent."""
    q, k, v = torch.zeros(1, 1, 1, 64), *torch.zeros(2, 1, 128, 1, 64)
    q[..., 0], q[..., 1] = 2048, 1
    k[:, ::64, :, 0], k[:, 64, :, 1] = 2048, 1
    v[:, 64] = 1
    lengths = torch.tensor([128], dtype=torch.int32)
    args = tuple(x.to(F16) for x in (q, k, v))
    check_budget(args, {"seqlens_k": lengths, "scale": 1.0} | splits(count))


def test_keys_that_a_query_does_not_see_do_not_show():
    (q, k, v), kwargs = drawn((130,), sq=3, capacity=130)
    k[:, 129], v[:, 128] = NAN, -INF  # seen by the last query, and by the last two
    out, lse = run((q, k, v), kwargs)
    shown = k[:, :128].contiguous(), v[:, :128].contiguous()
    alone = {"seqlens_k": torch.tensor([128], dtype=torch.int32)}
    first, first_lse = run((q[:, :1], *shown), alone)
    assert torch.equal(out[:, :1], first) and torch.equal(lse[..., :1], first_lse)
    assert (out[:, 1] == -INF).all() and out[:, 2].isnan().all()


def test_rows_that_see_nothing_are_empty():
    args, kwargs = drawn((2, 0), sq=4, capacity=64)
    bias = torch.tensor([0.0, NAN, INF, -INF])
    (out,) = run(args, kwargs | {"kind": "sigmoid", "score_bias": bias})
    assert (out[0, :2] == 0).all() and (out[1] == 0).all()
    assert out[0, 2:, 1].isnan().all() and (out[0, 2:, 3] == 0).all()
    out, lse = run(args, kwargs)
    assert (out[0, :2] == 0).all() and (lse[0, :, :2] == -INF).all()


def test_a_split_request_has_the_bits_that_it_has_alone():
    args, kwargs = drawn((200, 64, 130), page_size=64, sq=2)
    kwargs |= splits(2)
    out, lse = run(args, kwargs)
    for b in range(3):
        own = kwargs | {name: kwargs[name][b : b + 1] for name in ("seqlens_k", "block_table")}
        alone, alone_lse = run((args[0][b : b + 1], *args[1:]), own)
        assert torch.equal(out[b : b + 1], alone) and torch.equal(lse[b : b + 1], alone_lse)


def test_no_length_or_page_reaches_beyond_its_tensor():
    (q, k, v), kwargs = drawn((256, 256, 256), page_size=64)
    k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    maximum, minimum = 2**31 - 1, -(2**31)
    table = kwargs["block_table"].clone()
    table[0, ::2], table[2, 1] = maximum, minimum
    kwargs |= {"block_table": table}
    lengths = torch.tensor([maximum, minimum, 300], dtype=torch.int32)
    out, lse = run((q, k, v), kwargs | {"seqlens_k": lengths})
    assert (out[1] == 0).all() and (lse[1] == -INF).all()
    table = table.where((table >= 0) & (table < k.shape[0]), 0)
    lengths = torch.tensor([256, 0, 256], dtype=torch.int32)
    cut, cut_lse = run((q, k, v), {"block_table": table, "seqlens_k": lengths})
    assert torch.equal(out, cut) and torch.equal(lse, cut_lse)


def test_any_strides_of_whole_chunks():
    """Heads before tokens, keys and values in one tensor, slices of q and out."""
    (q, k, v), kwargs = drawn((100, 64), h=4, hk=2, page_size=64, capacity=128)
    wanted, _ = run((q, k, v), kwargs)
    both = torch.stack((k, v), 2).transpose(1, 3).contiguous().transpose(1, 3)
    wide = torch.full((2, 1, 4, 80), NAN, dtype=F16)
    wide[..., 8:72] = q
    out = torch.empty(2, 1, 4, 72, dtype=F16)[..., :64]
    with hopper(), _emulator.counting() as launches:
        tm.attention_decode(
            wide[..., 8:72], both[:, :, 0], both[:, :, 1], **kwargs, out=out, backend="emulated"
        )
    assert KERNEL in launches[0]["kernel"] and torch.equal(out, wanted)


def test_explain_names_the_kernel_that_runs():
    (q, k, v), kwargs = drawn((70,), sq=2, page_size=64, capacity=128)

    def check(why, q=q, k=k, v=v, **options):
        check_explained("attention_decode", why, q, k, v, **kwargs | options)

    check("")
    check("", num_splits=2, schedule="split")
    check("kind: must be 'softmax'", kind="relu")
    check("normalize: must be 'none'", kind="sigmoid", normalize="sum")
    check("alibi_slopes: must be None", alibi_slopes=torch.ones(4))
    check("scale: must be 2^-126", scale=-1.0)
    check("q: must have 32 tokens", q=q.repeat(1, 7, 2, 1)[:, :13, :5].contiguous())  # 65 rows
    check("q: must have head_dim 64 or 128; got 32", q[..., :32], k[..., :32], v[..., :32])
    check("q: must be float16", q.float(), k.float(), v.float())
    check("k_cache: must start at a multiple of 16", k=torch.cat((k[..., :8], k), 3)[..., 1:65])
    table = torch.arange(2, dtype=torch.int32)[None]
    small = (c[:2].reshape(-1, 32, 1, 64) for c in (k, v))
    rule = "k_cache: must have pages of 64 tokens or more; got 32"
    lengths = torch.tensor([60], dtype=torch.int32)
    check(rule, q, *small, block_table=table, seqlens_k=lengths)


def test_explain_takes_calls_without_heads():
    caches = torch.zeros(2, 1, 70, 0, 64, dtype=F16)
    q = torch.zeros(1, 9, 0, 64, dtype=F16)
    lengths = torch.tensor([70], dtype=torch.int32)
    with hopper():
        options = {"seqlens_k": lengths, "backend": "emulated"}
        kernel = tm.explain("attention_decode", q, *caches, **options).kernel
        assert kernel.startswith("csrc/dense/attention_decode in")  # nothing is launched
        assert tm.attention_decode(q, *caches, **options).shape == q.shape
