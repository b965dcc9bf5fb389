"""Samples and malformed calls of indexer_topk_select. Queries, keys and weights are integers:
scores are exact in every order of summation, so every backend selects the same keys.
"""

from __future__ import annotations

from typing import Any

import torch

from .._edits import set_argument, set_options
from ..registry import Malformed, Sample

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _ints(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


def _sample(
    b: int = 2,
    sq: int = 9,
    n: int = 50,
    h: int = 4,
    d: int = 16,
    topk: int = 8,
    queries: tuple[int, ...] | None = None,
    keys: tuple[int, ...] | None = None,
    change: Any = None,
    float_weights: bool = False,
    float8: bool = False,
    k_scale: str | None = None,
    **options: Any,
) -> Any:
    """queries, keys: leading sizes instead of (b, sq) and (b, n), for packed sequences and pages.
    Scales are powers of two, among them a negative one and values that make a key NaN or 0.
    """

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        rows = queries or (b, sq)
        q = torch.randint(-4, 5, (*rows, h, d), generator=g).to(dtype)
        k = torch.randint(-4, 5, (*(keys or (b, n)), d), generator=g).to(dtype)
        weights = torch.randint(-2, 4, (*rows, h), generator=g).to(dtype)
        if float_weights and dtype != torch.float64:
            weights = weights.float()
        if change:
            change(q, k, weights)
        given = dict(options)
        if float8:
            k = k.to(torch.float8_e4m3fn)
        if k_scale is not None:
            shape = (1,) if k_scale == "one" else k.shape[:-1]
            scale = 2.0 ** torch.randint(-2, 3, shape, generator=g)
            if k_scale == "hostile":
                scale[:, 3:8] = torch.tensor([-2, 0, float("nan"), float("inf"), -float("inf")])
            given["k_scale"] = scale.to(torch.promote_types(dtype, torch.float32))
        return (q, k, weights, topk), given

    return make


def _poison(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> None:
    nan, inf = float("nan"), float("inf")
    q[0, 3, 1, 2] = nan
    k[0, 5, 0] = nan
    k[0, 9:12, 1] = inf
    k[0, 20] = -inf
    weights[0, 7, 0] = nan


def _poison_row(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> None:
    k[0, 12, -1] = k[1, 0, 0] = float("nan")
    q[1, 1, 0, 0] = float("inf")


def _zeros(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> None:
    k.zero_()


TABLE = torch.tensor([[4, 1, 2, -1], [0, 3, -1, -1]], dtype=torch.int32)

SAMPLES = (
    Sample("causal", _sample(seqlens_k=_ints(50, 31), return_values=True)),
    Sample("float32 weights", _sample(h=3, d=20, float_weights=True, return_values=True)),
    Sample("no activation", _sample(causal=False, activation="none", return_values=True)),
    Sample("many heads", _sample(b=1, sq=3, n=300, h=64, d=32, topk=40)),
    Sample("a step", _sample(sq=1, n=200, h=16, d=64, topk=33, seqlens_k=_ints(190, 7))),
    Sample("one head", _sample(b=1, sq=40, n=90, h=1, d=8, topk=5)),
    Sample("wide heads", _sample(b=1, sq=2, n=40, h=5, d=250, return_values=True)),
    Sample("blocks", _sample(b=1, sq=12, n=130, block_k=16, topk=3, return_values=True)),
    Sample("odd blocks", _sample(
        b=1, sq=30, n=203, h=7, block_k=5, topk=9, num_sink=7, num_recent=4
    )),
    Sample("one block", _sample(block_k=1000, topk=2, num_sink=3)),
    Sample("sink and recent", _sample(sq=4, num_sink=7, num_recent=5)),
    Sample("no key between", _sample(num_sink=30, num_recent=20)),
    Sample("fewer keys than topk", _sample(topk=64, return_values=True)),
    Sample("ties", _sample(change=_zeros, topk=12)),
    Sample("NaN and infinities", _sample(b=1, n=40, topk=20, change=_poison)),
    Sample("paged", _sample(
        sq=3, keys=(5, 16), seqlens_k=_ints(41, 20), block_table=TABLE, return_values=True
    )),
    Sample("paged blocks", _sample(
        sq=1, keys=(5, 16), seqlens_k=_ints(41, 20), block_table=TABLE, block_k=12, topk=3
    )),
    Sample("packed", _sample(
        queries=(22,), keys=(60,), cu_seqlens_q=_ints(0, 9, 9, 10, 22),
        cu_seqlens_k=_ints(0, 30, 34, 34, 60), return_values=True,
    )),
    Sample("packed queries, pages", _sample(
        queries=(7,), keys=(5, 16), cu_seqlens_q=_ints(0, 6, 7), seqlens_k=_ints(41, 20),
        block_table=TABLE,
    )),
    Sample("float8", _sample(b=1, sq=3, h=3, d=20, float8=True, return_values=True)),
    Sample("float8, scales of tokens", _sample(
        sq=3, n=70, h=3, d=33, topk=64, float8=True, k_scale="token", return_values=True
    )),
    Sample("float8, hostile scales", _sample(
        sq=2, n=20, d=16, topk=20, float8=True, k_scale="hostile", change=_poison_row,
        return_values=True,
    )),
    Sample("float8, paged blocks", _sample(
        sq=1, keys=(5, 16), d=150, seqlens_k=_ints(41, 20), block_table=TABLE, block_k=6, topk=4,
        float8=True, k_scale="token", return_values=True,
    )),
    Sample("float8, packed", _sample(
        queries=(9,), keys=(40,), cu_seqlens_q=_ints(0, 3, 9), cu_seqlens_k=_ints(0, 5, 40),
        float8=True, k_scale="token", activation="none",
    )),
    Sample("float8, one scale", _sample(b=1, sq=2, d=64, float8=True, k_scale="one")),
    Sample("hinted", _sample(
        sq=1, n=400, h=3, topk=20, float8=True, k_scale="token", return_values=True,
        previous=torch.stack([17 * torch.arange(23), 400 - 31 * torch.arange(23)])[:, None].int(),
    )),
    Sample("more queries than keys", _sample(sq=9, n=5)),
    Sample("no keys", _sample(n=0, return_values=True)),
    Sample("no queries", _sample(sq=0)),
    Sample("no sequences", _sample(queries=(0,), keys=(0,), cu_seqlens_q=_ints(0))),
)  # fmt: skip


def _pack(**options: Any) -> Any:
    """The first sequence of the first sample, packed, with other options."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[:3] = [t[0] for t in args[:3]]
        kwargs.update({"seqlens_k": None, "cu_seqlens_q": _ints(0, 9), **options})

    return edit


def _packed_keys_alone(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[1] = args[1][0]
    kwargs["cu_seqlens_k"] = _ints(0, 50)


def _scaled(k_scale: torch.Tensor) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[1] = args[1].to(torch.float8_e4m3fn)
        kwargs["k_scale"] = k_scale

    return edit


# Edits of the first sample: q [2, 9, 4, 16], k [2, 50, 16], weights [2, 9, 4].
MALFORMED = (
    Malformed(
        "activation",
        "activation: must be 'relu' or 'none'; got 'gelu'",
        set_options(activation="gelu"),
    ),
    Malformed(
        "rank of q",
        "q: must have 4 dimensions [B, S, H, D]; got 3",
        set_argument(0, lambda q: q[0]),
    ),
    Malformed(
        "rank of packed q",
        "q: must have 3 dimensions [T, H, D] (packed); got 4",
        set_options(cu_seqlens_q=_ints(0, 9)),
    ),
    Malformed(
        "rank of k",
        "k: must have 3 dimensions [B, S, D] or [pages, page_size, D]; got 4",
        set_argument(1, lambda k: k[None]),
    ),
    Malformed(
        "rank of packed k",
        "k: must have 2 dimensions [T, D] (packed); got 3",
        set_options(cu_seqlens_k=_ints(0, 9)),
    ),
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda q: q.int()),
    ),
    Malformed(
        "dtype of k",
        "k: must have the dtype of q, float32, or float8_e4m3fn; got float16",
        set_argument(1, lambda k: k.half()),
    ),
    Malformed(
        "shape of weights",
        "weights: must have shape [2, 9, 4]; got [2, 9, 3]",
        set_argument(2, lambda w: w[..., 1:]),
    ),
    Malformed(
        "dtype of weights",
        "weights: must be float32 or have the dtype of q, float32; got bfloat16",
        set_argument(2, lambda w: w.bfloat16()),
    ),
    Malformed(
        "layout",
        "k: must have a contiguous last dimension",
        set_argument(1, lambda k: k.transpose(1, 2).contiguous().transpose(1, 2)),
    ),
    Malformed(
        "layout of weights",
        "weights: must have a contiguous last dimension",
        set_argument(2, lambda w: w.repeat_interleave(2, 2)[..., ::2]),
    ),
    Malformed(
        "many heads",
        "q: must have 1 to 64 heads; got 65",
        lambda a, k: a.__setitem__(slice(0, 3, 2), [torch.zeros(2, 9, 65, 16),
                                                    torch.zeros(2, 9, 65)]),
    ),
    Malformed(
        "wide head",
        "q: must have a head dimension of 1 to 256; got 257",
        set_argument(0, lambda q: torch.zeros(2, 9, 4, 257)),
    ),
    Malformed(
        "head dimension",
        "k: must have the head dimension of q, 16; got 15",
        set_argument(1, lambda k: k[..., 1:]),
    ),
    Malformed(
        "packed keys alone",
        "cu_seqlens_q: must be given with cu_seqlens_k; got None",
        _packed_keys_alone,
    ),
    Malformed(
        "cu_seqlens_q",
        "cu_seqlens_q: must be int32; got int64",
        _pack(cu_seqlens_q=torch.tensor([0, 9])),
    ),
    Malformed(
        "cu_seqlens_k",
        "cu_seqlens_k: must have the length of cu_seqlens_q, 2; got 3",
        _pack(cu_seqlens_k=_ints(0, 9, 50)),
    ),
    Malformed(
        "lengths of packed keys",
        "seqlens_k: must be None with cu_seqlens_k; got [1]",
        _pack(seqlens_k=_ints(50)),
    ),
    Malformed(
        "pages of packed keys",
        "block_table: must be None with cu_seqlens_k; got [1, 1]",
        _pack(block_table=_ints(0)[None]),
    ),
    Malformed(
        "batch",
        "k: must have the batch size of q, 2; got 1",
        set_argument(1, lambda k: k[:1]),
    ),
    Malformed(
        "batch of the table",
        "block_table: must have the batch size of q, 2; got 3",
        set_options(block_table=torch.zeros(3, 1, dtype=torch.int32)),
    ),
    Malformed(
        "block_table", "block_table: must be int32; got float32",
        set_options(block_table=torch.zeros(2, 1)),
    ),
    Malformed("topk", "topk: must be 1 to 65536; got 0", set_argument(3, lambda topk: 0)),
    Malformed("large topk", "topk: must be 1 to 65536; got 65537",
              set_argument(3, lambda topk: 65537)),
    Malformed("block_k", "block_k: must be 1 to 2^31 - 1; got 0", set_options(block_k=0)),
    Malformed("num_sink", "num_sink: must not be negative; got -1", set_options(num_sink=-1)),
    Malformed("num_recent", "num_recent: must not be negative; got -2", set_options(num_recent=-2)),
    Malformed(
        "seqlens_k",
        "seqlens_k: must have shape [2]; got [3]",
        set_options(seqlens_k=_ints(1, 2, 3)),
    ),
    Malformed(
        "scale of wide keys",
        "k_scale: goes with caches in float8_e4m3fn alone; got float32",
        set_options(k_scale=torch.ones(2, 50)),
    ),
    Malformed(
        "shape of scales",
        "k_scale: must have shape [1] or [2, 50]; got [2, 49]",
        _scaled(torch.ones(2, 49)),
    ),
    Malformed(
        "dtype of scales",
        "k_scale: must be float32; got float16",
        _scaled(torch.ones(2, 50, dtype=torch.float16)),
    ),
    Malformed(
        "rank of previous",
        "previous: must have 3 dimensions [B, Sq, K]; got 2",
        set_options(previous=_ints(1)[None]),
    ),
    Malformed(
        "rank of packed previous",
        "previous: must have 2 dimensions [T, K] (packed); got 3",
        _pack(cu_seqlens_k=_ints(0, 50), previous=_ints(1)[None, None]),
    ),
    Malformed(
        "dtype of previous",
        "previous: must be int32; got int64",
        set_options(previous=torch.zeros(2, 9, 3, dtype=torch.int64)),
    ),
    Malformed(
        "lists of previous",
        "previous: must have a list for each query, [2, 9]; got [2, 8]",
        set_options(previous=torch.zeros(2, 8, 3, dtype=torch.int32)),
    ),
    Malformed(
        "entries of previous",
        "previous: must have a column; got 0",
        set_options(previous=torch.zeros(2, 9, 0, dtype=torch.int32)),
    ),
    Malformed(
        "layout of previous",
        "previous: must have a contiguous last dimension",
        set_options(previous=torch.zeros(2, 3, 9, dtype=torch.int32).mT),
    ),
    Malformed(
        "length",
        "seqlens_k: must be 0 to 50; got 51",
        set_options(seqlens_k=_ints(50, 51)),
        values=True,
    ),
    Malformed(
        "missing page",
        "block_table: must hold pages below 2 up to the length; got 7",
        set_options(block_table=_ints(0, 7)[:, None], seqlens_k=_ints(50, 9)),
        values=True,
    ),
    Malformed(
        "ends that decrease",
        "cu_seqlens_q: must not decrease; got [0, 12, 9]",
        _pack(cu_seqlens_q=_ints(0, 12, 9), cu_seqlens_k=_ints(0, 9, 50)),
        values=True,
    ),
    Malformed(
        "end of packed keys",
        "cu_seqlens_k: must end at the number of tokens, 50; got 49",
        _pack(cu_seqlens_k=_ints(0, 49)),
        values=True,
    ),
)  # fmt: skip
