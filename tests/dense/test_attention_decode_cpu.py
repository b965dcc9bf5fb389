"""The CPU kernels of attention_decode and sparse_decode_attention on float8_e4m3fn caches and on
latent caches: rows that share a vector or a tile, whole and partial vectors of codes."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants

import tokenmill as tm
from tokenmill import registry
from tokenmill.dense.attention_decode_cases import decode_call
from tokenmill.dense.attention_draws import draw_tensor
from tokenmill.registry import Sample
from tokenmill.sparse.sparse_decode_attention_cases import sparse_call
from tokenmill.testing import compare

NAN = float("nan")
FLOAT8 = torch.float8_e4m3fn
VARIANTS = [v for v in cpu_variants() if v[0] == "cpu"]

pytestmark = pytest.mark.skipif("cpu" not in backends(), reason="no CPU backend")
each_isa = pytest.mark.parametrize("isa", [isa for _, isa in VARIANTS], indirect=True)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# Query heads, KV heads, queries: one row, two, four and more rows per vector, half a tile, and
# several partially filled row tiles.
ROWS = [(2, 2, 1), (4, 2, 1), (4, 1, 3), (9, 1, 1), (40, 2, 2)]


def keeps_the_budget(op, call, dtype):
    found = compare(registry.get(op), Sample("drawn", call), "cpu", dtype)
    assert not [c for c in found if not c.ok]


@each_isa
@each_dtype
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dims", [(128, 64), (80, 40), (7, 130)], ids=str)
def test_float8_with_few_and_many_rows(dims, rows, dtype, isa):
    (h, hk, sq), (d, dv) = rows, dims
    call = decode_call(
        (75, 9), sq=sq, h=h, hk=hk, d=d, dv=dv, page_size=8, capacity=80, float8=("token", "head")
    )
    keeps_the_budget("attention_decode", call, dtype)


@each_isa
@each_dtype
@pytest.mark.parametrize("packed", [False, True])
def test_float8_with_so_many_queries_that_keys_are_packed(packed, dtype, isa):
    options = {"queries": (70, 3)} if packed else {"sq": 70, "window": (30, 0), "softcap": 3.0}
    call = decode_call(
        (90, 70), d=40, dv=72, page_size=8, capacity=96, float8=("token", "head"),
        return_lse=True, **options,
    )  # fmt: skip
    keeps_the_budget("attention_decode", call, dtype)


@each_isa
@each_dtype
@pytest.mark.parametrize("h", [3, 18])
@pytest.mark.parametrize("float8", [None, ("token", "token")], ids=str)
def test_latent_heads_with_few_and_many_rows(float8, h, dtype, isa):
    call = decode_call(
        (35, 3), h=h, hk=1, d=576, dv=512, capacity=40, float8=float8, latent=float8 is None
    )
    keeps_the_budget("attention_decode", call, dtype)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "relu"])
@pytest.mark.parametrize("sizes", [(4, 32, 32), (20, 300, 72)], ids=str)
def test_every_term_with_float8(sizes, kind):
    h, d, dv = sizes
    options = {
        "alibi_slopes": draw_tensor(2, h, positive=True),
        "score_bias": draw_tensor(h),
        "softcap": 5.0,
        "window": (20, 0),
    }
    if kind == "softmax":
        options["sink"] = draw_tensor(h)
    call = decode_call(
        (33, 60), sq=3, h=h, hk=2, d=d, dv=dv, float8=("head", "token"), kind=kind, **options
    )
    keeps_the_budget("attention_decode", call, torch.float32)


@pytest.mark.parametrize("float8", [None, ("token", "one")], ids=str)
@pytest.mark.parametrize("sizes", [(4, 2, 2, 32, 32), (20, 1, 1, 300, 72)], ids=str)
@pytest.mark.parametrize("more", [{}, {"extra": 5, "pairs": 12}], ids=["cached", "extra"])
def test_lists_with_extra_keys_and_rotations(more, sizes, float8):
    """Extra keys have the dtype of q although the cache holds float8 codes."""
    h, hk, lists, d, dv = sizes
    call = sparse_call(
        (50, 21), h=h, hk=hk, lists=lists, d=d, dv=dv, num_recent=3, float8=float8, **more
    )
    for dtype in (torch.float32, torch.bfloat16):
        keeps_the_budget("sparse_decode_attention", call, dtype)


def drawn(**options):
    return decode_call(**options)(torch.float32, torch.Generator().manual_seed(0))


def attend(args, kwargs, backend="cpu"):
    """Returns out and lse."""
    return tm.attention_decode(*args, **{**kwargs, "return_lse": True}, backend=backend)


@each_isa
@pytest.mark.parametrize("h", [1, 4, 16])
def test_every_code_is_exact(h, isa):
    """One key at a time has all the weight, so that the output is its value."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN
    v = codes.view(FLOAT8).view(2, 1, 1, 128)
    q = torch.ones(2, 1, h, 128)
    k = v.roll(5, 3)
    lengths = torch.ones(2, dtype=torch.int32)
    out, lse = attend((q, k, v), {"seqlens_k": lengths, "scale": 1.0})
    assert torch.equal(out, v.float().expand_as(out))
    torch.testing.assert_close(lse, k.double().sum(-1).float().expand_as(lse), rtol=1e-6, atol=1e-6)


@each_isa
@pytest.mark.parametrize("column", [3, 75], ids=["whole vectors", "tail"])
@pytest.mark.parametrize("rows", [(2, 2, 2), (4, 1, 2), (16, 1, 2)], ids=str)
def test_nan_codes_show_to_rows_that_see_them(rows, column, isa):
    h, hk, sq = rows
    args, kwargs = drawn(
        lengths=(40,), sq=sq, h=h, hk=hk, d=80, dv=80, capacity=40, float8=("head", "token")
    )
    clean = attend(args, kwargs)[0]
    for cache in (1, 2):
        changed = list(args)
        changed[cache] = args[cache].clone()
        changed[cache].view(torch.uint8)[0, 39, 0, column] = 0xFF  # first KV head
        got = attend(changed, kwargs)[0]
        seen = got[0, 1, : h // hk]
        if cache == 1:
            assert seen.isnan().all()
        else:
            assert torch.equal(seen.isnan(), torch.arange(80).eq(column).expand_as(seen))
            seen[:, column] = clean[0, 1, : h // hk, column]
        got[0, 1, : h // hk] = clean[0, 1, : h // hk]
        torch.testing.assert_close(got, clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("float8", [None, ("head", "head")], ids=str)
@pytest.mark.parametrize("h", [4, 16])
def test_what_earlier_queries_do_not_see_does_not_show(h, float8):
    """Rows of one query fill a vector: none of them sees the last key."""
    args, kwargs = drawn(lengths=(40,), sq=2, h=h, hk=1, d=16, dv=16, capacity=40, float8=float8)
    want = attend(args, kwargs, "reference")[0]
    args[2][0, 39] = NAN
    got = attend(args, kwargs)[0]
    assert got[:, 1].isnan().all()
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"h": 4, "d": 64, "dv": 64, "float8": ("token", "token")},
        {"h": 20, "hk": 1, "d": 288, "dv": 256, "latent": True},
    ],
    ids=["float8", "latent"],
)
def test_threads_and_layouts_change_no_bit(options, threads):
    lengths = (2500, 100)
    args, kwargs = drawn(lengths=lengths, capacity=2560, **options)
    threads(2)
    want = attend(args, kwargs)
    threads(1)
    pages = torch.randperm(2 * 160, generator=torch.Generator().manual_seed(1))

    def in_pages(x):
        """Pages of 16 tokens in any order, at every other page slot."""
        paged = torch.empty(2 * 160, 2, 16, *x.shape[2:], dtype=x.dtype)[:, 1]
        for at, page in zip(pages, x.reshape(-1, 16, *x.shape[2:]), strict=True):
            paged[at] = page
        return paged

    k = in_pages(args[1])
    v = k[..., : options["dv"]] if options.get("latent") else in_pages(args[2])
    scales = {name: in_pages(kwargs[name]) for name in ("k_scale", "v_scale") if name in kwargs}
    kwargs |= {"block_table": pages.view(2, 160).int(), **scales}
    found = attend((args[0], k, v), kwargs)
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))


@pytest.mark.parametrize("float8", [None, ("token", "token")], ids=str)
def test_any_number_of_splits_of_tiles(float8):
    for splits in (1, 3):
        call = decode_call(
            (150, 31), h=20, hk=1, d=288, dv=264, capacity=160, num_splits=splits, float8=float8
        )
        keeps_the_budget("attention_decode", call, torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"sq": 30, "window": (25, 4), "causal": False},
        {"sq": 30, "float8": ("token", "head"), "page_size": 8},
        {"queries": (31, 3), "causal": False},
    ],
    ids=["window", "float8", "packed"],
)
def test_chunks_of_queries(options):
    """Chunks have 12 queries: 20 heads each fill the 256 rows that tiles take together."""
    call = decode_call((70, 9), h=20, hk=1, d=288, dv=40, capacity=72, **options)
    keeps_the_budget("attention_decode", call, torch.float32)
