"""Rules that several operators share, each stated once: its words, and the edits that break it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from math import inf, nan, prod
from typing import Any

import torch
from torch import Tensor, zeros

from malformed import Call, Edit, Malformed, ints, refused, refused_values

FLOATS = "must be float16, bfloat16 or float32"
QUERIES = "[B, S, H, D]"
TOKENS = "[B, N, C]"
PAGED = "[B, S, H, D] or [pages, page_size, H, D]"
CACHE = "[B, S, Hk, D] (in pages: [P, page size, Hk, D])"
OR_FLOAT8 = ", or float8_e4m3fn"
NO_PAGE = "block_table: must hold pages below 2 up to the length; got"

Shape = Sequence[int]


def shown(value: Any) -> str:
    """A value in the words of an error message."""
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def strides(shape: Shape) -> list[int]:
    """Strides of a contiguous tensor, in elements."""
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def cast(to: torch.dtype, *names: str) -> Edit:
    def edit(call: Call) -> None:
        call.update({name: call[name].to(to) for name in names})

    return edit


float8 = partial(cast, torch.float8_e4m3fn)


def sliced(*names: str, at: slice | tuple[slice, ...]) -> Edit:
    def edit(call: Call) -> None:
        call.update({name: call[name][at] for name in names})

    return edit


# Rules of one argument.


def option(name: str, rule: str, /, *wrong: Any, **others: Any) -> Iterator[Malformed]:
    """An option at wrong values, next to other options."""
    for value in wrong:
        yield refused(f"{name}: {rule}; got {shown(value)}", **{name: value}, **others)


def rank(name: str, dims: str, /, *edits: Edit, got: int = 0, **options: Any) -> Malformed:
    """A tensor of one dimension too few, or of `got`. With edits or options, which ask for these
    dimensions, the tensor itself stays."""
    want = dims[: dims.index("]")].count(",") + 1
    got = got or want - 1
    if not edits and not options:
        options[name] = lambda t: t[(0,) * (want - got) or (None,) * (got - want)]
    return refused(f"{name}: must have {want} dimensions {dims}; got {got}", *edits, **options)


def dtype(name: str, rule: str, /, *wrong: str) -> Iterator[Malformed]:
    for other in wrong:
        yield refused(f"{name}: {rule}; got {other}", cast(getattr(torch, other), name))


def same_dtype(name: str, of: str, /, other: str = "float16", also: str = "") -> Malformed:
    return next(dtype(name, f"must have the dtype of {of}, float32{also}", other))


def same_batch(name: str, of: str, batch: int, /) -> Malformed:
    rule = f"{name}: must have the batch size of {of}, {batch}; got 1"
    return refused(rule, **{name: lambda t: t[:1]})


def layout(name: str, /, **changes: Tensor) -> Malformed:
    changes = changes or {name: lambda t: t.repeat_interleave(2, -1)[..., ::2]}
    return refused(f"{name}: must have a contiguous last dimension; strides", **changes)


def tensor(
    name: str,
    shape: str,
    wrong: Shape,
    kind: str = "float32",
    other: str = "int64",
    /,
    *edits: Edit,
) -> Iterator[Malformed]:
    """A tensor of a wrong shape, and one of another dtype than `kind`."""
    sizes = re.findall(r"\d+|[A-Za-z][^,\]]*", shape[: shape.index("]")])
    right = [int(size) if size.isdigit() else 1 for size in sizes]
    of = {name: zeros(*wrong, dtype=getattr(torch, kind))}
    yield refused(f"{name}: must have shape {shape}; got {list(wrong)}", *edits, **of)
    of = {name: zeros(*right, dtype=getattr(torch, other))}
    yield refused(f"{name}: must be {kind}; got {other}", *edits, **of)


def lengths(
    name: str, batch: int, longest: int, /, other: int = 0, of: str = ""
) -> Iterator[Malformed]:
    """Lengths [batch] of 0 to `longest`."""
    yield from tensor(name, f"[{batch}]", [other or batch + 1], "int32")
    for bad in (-1, longest + 1):
        wrong = {name: ints(*[0] * (batch - 1), bad)}
        yield refused_values(f"{name}: must be 0 to {of}{longest}; got {bad}", **wrong)


def offsets(name: str, packed: Edit, right: Shape, unordered: Shape, /) -> Iterator[Malformed]:
    """Offsets of packed sequences; `packed` makes the first sample a packed call."""
    *starts, end = right
    short, late = ints(*starts, end - 1), ints(1, *right[1:])
    for make, rule, wrong in (
        (refused, "must be int32; got int64", ints(*right, dtype=torch.int64)),
        (refused, "must have 1 dimension of at least 1 element; got [0]", ints()),
        (refused_values, "must start at 0; got 1", late),
        (refused_values, f"must not decrease; got {list(unordered)}", ints(*unordered)),
        (refused_values, f"must end at the number of tokens, {end}; got {end - 1}", short),
    ):
        yield make(f"{name}: {rule}", packed, **{name: wrong})


def shared(name: str, other: str, at: Shape, /, *edits: Edit, **changes: Any) -> Malformed:
    """A written tensor, of strides `at`, that is another argument, or that an edit makes of it."""

    def edit(call: Call) -> None:
        call[name] = call[other]

    rule = f"{name}: must not share memory with {other}; strides; got {list(at)}"
    return refused(rule, *edits or [edit], **changes)


def expanded(name: str, at: str, /, **changes: Any) -> Malformed:
    """A written tensor, of strides `at`, whose elements share addresses."""
    rule = "must have each element at an address of its own; strides"
    return refused(f"{name}: {rule}; got {at}", **changes)


def out(shape: Shape, wrong: Shape, rule: str = "", /) -> Iterator[Malformed]:
    """A tensor of the shape of the result, which the operator writes; `rule`: of its dtype, where
    that is not q's."""
    yield refused(f"out: must have shape {list(shape)}; got {list(wrong)}", out=zeros(*wrong))
    of = rule or "must have the dtype of q, float32"
    yield refused(f"out: {of}; got float16", out=zeros(*shape).half())
    yield layout("out", out=zeros(*shape).repeat_interleave(2, -1)[..., ::2])
    at = [0, *strides(shape)[1:]]
    yield expanded("out", str(at), out=zeros(*shape[1:]).expand(*shape))
    if not rule:
        yield shared("out", "q", strides(shape))


def block_lists(shape: Shape, /) -> Iterator[Malformed]:
    """indices [B, heads, ..., K] of 2 heads, for 4 heads of q, and their counts."""
    of = "must have shape [{}] with 1, 2 or 4 heads; got ".format(
        ", ".join(map(str, [shape[0], "heads", *shape[2:-1], "K"]))
    )
    yield refused(f"indices: {of}{[shape[0], *shape[2:]]}", indices=lambda t: t[:, 0])
    three = [shape[0], 3, *shape[2:]]
    yield refused(f"indices: {of}{three}", indices=zeros(*three, dtype=torch.int32))
    yield from dtype("indices", "must be int32", "int64")
    yield layout("indices")
    got = [shape[0], 1, *shape[2:-1]]
    rule = f"counts: must have shape {list(shape[:-1])}; got {got}"
    yield refused(rule, counts=zeros(*got, dtype=torch.int32))


# Rules of queries, keys and values.


def queries(shape: Shape, /, dims: str = QUERIES, most: int = 256) -> Iterator[Malformed]:
    yield rank("q", dims)
    yield from dtype("q", FLOATS, "int32", "int64")
    rule = f"q: must have a head dimension of 1 to {most}; got {most + 1}"
    yield refused(rule, q=zeros(*shape[:-1], most + 1))


def keys(
    q: Shape, k: Shape, /, name: str = "k", values: str = "", also: str = ""
) -> Iterator[Malformed]:
    """Keys of queries; with the name of values that have their heads."""
    yield same_dtype(name, "q", also=also)
    of = {name: lambda t: t[..., 1:]}
    yield refused(f"{name}: must have the head dimension of q, {q[-1]}; got {q[-1] - 1}", **of)
    names = [name, *filter(None, [values])]
    rule = f"{name}: must have the batch size of q, {q[0]}; got {q[0] - 1}"
    yield refused(rule, sliced(*names, at=slice(q[0] - 1)))
    three = dict.fromkeys(names, zeros(*k[:-2], 3, k[-1]))
    rule = f"{name}: number of heads must divide that of q, {q[-2]} (GQA); got 3"
    yield refused(rule, **three)


def qkv(q: Shape, k: Shape, /, dims: str = QUERIES) -> Iterator[Malformed]:
    """Queries [..., H, D], keys and values [..., Hk, D]."""
    yield from queries(q, dims)
    yield rank("k", dims, got=len(q) + 1)
    yield from keys(q, k, values="v")
    yield same_dtype("v", "q")
    for name in "kv":
        of = {name: lambda t: t.to("meta")}
        yield refused(f"{name}: must be on the device of q, cpu; got meta", **of)
    rule = f"v: must have the shape of k up to the head dimension, {list(k)}"
    yield refused(f"{rule}; got {[k[0], k[1] - 1, *k[2:]]}", v=lambda v: v[:, 1:])


def scale() -> Iterator[Malformed]:
    yield from option("scale", "must be at most 2^127 in size", nan, inf)
    yield from option("scale", "must be a number", torch.ones(()))


def forced() -> Iterator[Malformed]:
    """Keys that every query sees."""
    yield from option("num_sink", "must not be negative", -1)
    yield from option("num_recent", "must not be negative", -2, -3)


def kinds() -> Iterator[Malformed]:
    """A map of scores and its normaliser."""
    kind = "must be 'softmax', 'sigmoid', 'relu', 'elu1', 'linear' or 'taylor2'"
    yield from option("kind", kind, "gelu", return_lse=False)
    rule = "must be None, 'sum' or 'count'"
    yield from option("normalize", rule, "mean", kind="relu", return_lse=False)
    yield from option("normalize", "needs a kind other than 'softmax'", "sum")
    rule = "return_lse: needs kind 'softmax' or normalize 'sum', not; got 'sigmoid'"
    yield refused(rule, kind="sigmoid", normalize="count")
    yield from option("softcap", "must be finite and not negative (0 = off)", -1.0)
    rule = "window: left must be >= -1 (-1 = no limit); got -2"
    yield refused(rule, window=(-2, 0))
    yield from option("window", "must be two ints (left, right)", 4)


def per_head(b: int, h: int) -> Iterator[Malformed]:
    """Numbers of each head."""
    yield from tensor("score_bias", f"[{h}] or [{b}, {h}]", [3])
    yield from tensor("alibi_slopes", f"[{h}] or [{b}, {h}]", [3])
    yield from tensor("sink", f"[{h}]", [1])
    yield from option("score_bias", "must be a number, 'neg_log_n' or a tensor", "log_n")


def previous(rows: Shape, dims: str, of: str, /) -> Iterator[Malformed]:
    """Lists [*rows, K] of an earlier step: `dims` in words, and `of`, what a query has of them."""
    short = [*rows[:-1], rows[-1] - 1]
    yield rank("previous", dims, previous=zeros(*rows, dtype=torch.int32))
    wrong = {
        "must be int32; got int64": zeros(*rows, 3, dtype=torch.int64),
        f"must have a {of}; got {short if len(rows) > 1 else short[0]}": zeros(*short, 3).int(),
        "must have a column; got 0": zeros(*rows, 0).int(),
        "must have a contiguous last dimension; strides": zeros(*rows[:-1], 3, rows[-1]).int().mT,
    }
    for rule, lists in wrong.items():
        yield refused(f"previous: {rule}", previous=lists)


def packed_lists(packed: Edit, q: Shape, k: Shape, unordered: Shape, /) -> Iterator[Malformed]:
    """Offsets q and k of packed queries and keys of an operator that takes pages also."""
    yield from offsets("cu_seqlens_q", packed, q, unordered)
    yield from offsets("cu_seqlens_k", packed, k, [0, k[-1] + 1, k[-1]])
    rule = f"cu_seqlens_k: must have the length of cu_seqlens_q, {len(q)}; got 2"
    yield refused(rule, packed, cu_seqlens_k=ints(0, k[-1]))
    b = len(q) - 1
    for name, given in (("seqlens_k", zeros(b).int()), ("block_table", zeros(b, 1).int())):
        rule = f"{name}: must be None with cu_seqlens_k; got {list(given.shape)}"
        yield refused(rule, packed, **{name: given})


def table_of_queries(b: int) -> Iterator[Malformed]:
    """Pages of keys, for b requests of queries; the first sample has keys [2, ...]."""
    table = zeros(b + 1, 1, dtype=torch.int32)
    rule = f"block_table: must have the batch size of q, {b}; got {b + 1}"
    yield refused(rule, block_table=table)
    yield refused("block_table: must be int32; got float32", block_table=zeros(b, 1))
    yield refused_values(f"{NO_PAGE} 7", block_table=ints([0], [7]))


# Rules of caches.


def cache_scales(
    name: str, shape: Shape, narrow: Edit, /, either: str = "[1], [{}] or {}"
) -> Iterator[Malformed]:
    """Scales of a float8 cache, for all, a head or a row [B, S, Hk]; `narrow` makes it float8."""
    either = either.format(shape[-1], list(shape))
    rule = f"{name}: requires a cache in float8_e4m3fn; got float32"
    yield refused(rule, **{name: torch.ones(1)})
    for n in (3, shape[1]):
        yield refused(
            f"{name}: must have shape {either}; got [{n}]", narrow, **{name: torch.ones(n)}
        )
    yield from tensor(name, either, [*shape[:-1], shape[-1] - 1], "float32", "float16", narrow)


def written_caches(k: Shape, other: str = "float16") -> Iterator[Malformed]:
    """k_cache and v_cache of shape k, which the operator writes."""
    yield rank("v_cache", CACHE)
    yield same_dtype("v_cache", "k_cache", other)
    yield expanded("k_cache", str([0, *strides(k)[1:]]), k_cache=lambda t: t[:1].expand(k))
    yield shared("v_cache", "k_cache", strides(k))


def paged(call: Call) -> None:
    """The caches [3, 64, ...] as 12 pages of 16 tokens."""
    for name in ("k_cache", "v_cache"):
        call[name] = call[name].unflatten(1, (4, 16)).flatten(0, 1)
    call["block_table"] = torch.arange(12).int().view(3, 4)


def decode(q: Shape, k: Shape) -> Iterator[Malformed]:
    """Queries [B, Sq, H, D] on caches k_cache and v_cache [B, S, Hk, D] with scales, seqlens_k and
    pages."""
    yield from queries(q, "[B, Sq, H, D]", 576)
    yield from keys(q, k, "k_cache", "v_cache", OR_FLOAT8)
    yield layout("k_cache")
    yield rank("v_cache", CACHE, got=5)
    rule = "v_cache: must have the dtype of k_cache, float8_e4m3fn; got float32"
    yield refused(rule, float8("k_cache"))
    rule = f"v_cache: must have the shape of k_cache up to the head dimension, {list(k)}; got "
    yield refused(rule + str([k[0], k[1] - 1, *k[2:]]), v_cache=lambda v: v[:, 1:])
    rule = "v_cache: must have a head dimension of 1 to 512; got 513"
    yield refused(rule, v_cache=zeros(*k[:-1], 513))
    for name in ("k_scale", "v_scale"):
        yield from cache_scales(name, k[:-1], float8("k_cache", "v_cache"))
    yield from option("num_splits", "must be 0 (automatic) to 1024", -1)
    yield from lengths("seqlens_k", k[0], k[1], k[0] - 1, "what the cache holds of a request, ")
    yield from tensor("block_table", "[3, pages]", [2, 4], "int32", "int64", paged)
    rule = "k_cache: must have pages of a power of two of tokens; got 12"
    yield refused(
        rule, sliced("k_cache", "v_cache", at=(slice(None), slice(12))), block_table=ints([0])
    )
