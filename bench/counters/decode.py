"""Cases of attention_decode and sparse_decode_attention. A row is a key of a KV head with its
value; listed keys count once per head that has or shares the list."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import tokenmill as tm
from tokenmill.dense.attention_decode_cases import decode_call
from tokenmill.sparse.sparse_decode_attention_cases import sparse_call

from .case import Counted, CounterCase, on_device, products

H, HK, D = 32, 8, 128
F32, BF16 = torch.float32, torch.bfloat16
FLOAT8: dict[str, Any] = {"float8": ("token", "token")}
# One KV head, whose first channels are the value.
LATENT: dict[str, Any] = {"h": 16, "hk": 1, "d": 576, "dv": 512, "latent": True}


def _case(
    title: str,
    rows: int,
    row_queries: int,
    queries: int,
    dim: int,
    dtype: torch.dtype,
    prepare: Callable[[], Callable[[], object]],
    float8: bool = False,
) -> CounterCase:
    """rows: keys, each read by row_queries query rows; `queries`: total number of query rows."""
    size = dtype.itemsize
    row = dim + 4 if float8 else dim * size  # bytes of a key or value, with its scale
    return CounterCase(
        title,
        rows,
        2 * rows * row + queries * (2 * dim * size + 4),  # keys, values; q, out, lse
        products(2 * rows * row_queries * dim, dtype),
        prepare,
    )


def _latent(title: str, op: Any, make: Any, rows: int) -> CounterCase:
    """rows: keys of one request, read by all query heads."""

    def prepare() -> Callable[[], object]:
        args, kwargs = _draw(make, BF16)
        return lambda: op(*args, **kwargs)

    h, dims = LATENT["h"], LATENT["d"] + LATENT["dv"]
    return CounterCase(
        title,
        rows,
        2 * rows * LATENT["d"] + h * (2 * dims + 4),
        products(rows * h * dims, BF16),
        prepare,
    )


def _draw(make: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = make(dtype, torch.Generator().manual_seed(0))
    return args, kwargs | {"backend": "emulated"}


def _dense(
    name: str, lengths: tuple[int, ...], schedule: str, dtype: torch.dtype = BF16,
    tokens: int = 1, page_size: int | None = None, dim: int = D, heads: int = H, **options: Any,
) -> CounterCase:  # fmt: skip
    def prepare() -> Callable[[], object]:
        capacity = max(lengths) if page_size is None else -(-max(lengths) // page_size) * page_size
        make = decode_call(
            lengths, tokens, heads, HK, dim, dim, page_size, capacity, schedule=schedule, **options
        )
        args, kwargs = _draw(make, dtype)
        return lambda: tm.attention_decode(*args, **kwargs)

    # A token does not see later tokens.
    rows = HK * sum(lengths)
    return _case(
        f"{str(dtype)[6:]}, keys {', '.join(map(str, lengths))}{name}, {schedule}",
        rows, heads // HK * tokens, len(lengths) * tokens * heads, dim, dtype, prepare,
        "float8" in options,
    )  # fmt: skip


def _on(device: str, case: CounterCase) -> CounterCase:
    prepare = functools.partial(on_device, device, case.prepare)
    return dataclasses.replace(case, title=f"{device} {case.title}", prepare=prepare)


def _device_cases(device: str) -> Iterator[CounterCase]:
    """Cases of the sm_90a kernel, and of the sm_80 kernel on 8.0. Whole tiles only: the machine
    also counts TMA bytes out of bounds."""
    lengths = (2048, 320)
    for dim in (64, 128):
        yield _on(device, _dense(f", D={dim}", lengths, "stream_k", dim=dim))
        yield _on(device, _dense(f", D={dim}, 4 tokens", lengths, "stream_k", tokens=4, dim=dim))
    yield _on(device, _dense(", one head", lengths, "stream_k", heads=HK))
    yield _on(device, _dense(", pages of 64", lengths, "stream_k", page_size=64))
    yield _on(device, _dense(", no parts", lengths, "split", num_splits=1))


def _packed(
    lengths: tuple[int, ...],
    queries: tuple[int, ...],
    dtype: torch.dtype = BF16,
    **options: Any,
) -> CounterCase:
    """A prefill chunk together with decode rows, in pages of 16."""

    def prepare() -> Callable[[], object]:
        make = decode_call(lengths, 1, H, HK, D, D, 16, max(lengths), queries, **options)
        args, kwargs = _draw(make, dtype)
        return lambda: tm.attention_decode(*args, **kwargs)

    rows, size = HK * sum(lengths), dtype.itemsize
    pairs = sum(sq * (2 * sk - sq + 1) // 2 for sq, sk in zip(queries, lengths, strict=True))
    where = "float8" if options else "pages of 16"
    return CounterCase(
        f"{str(dtype)[6:]}, keys {lengths}, queries {queries}, {where}",
        rows,
        2 * rows * (D + 4 if options else D * size) + sum(queries) * H * (2 * D * size + 4),
        products(2 * H * pairs * D, dtype),
        prepare,
    )


def dense_cases() -> Iterator[CounterCase]:
    for dtype in (BF16, F32):
        for schedule in ("split", "stream_k"):
            yield _dense("", (2000, 300), schedule, dtype)
    for schedule in ("split", "stream_k"):
        yield _dense("", (5000, 2500, 1200, 300), schedule)
    yield _dense(", pages of 16", (2000, 304), "split", page_size=16)
    yield _dense(", 4 tokens", (2000, 300), "split", tokens=4)
    yield _dense(", D=64", (2000, 300), "split", dim=64)
    yield _packed((512, 304), (64, 1))
    yield _packed((512, 304), (64, 1), F32)
    yield _dense(", float8", (2000, 300), "split", **FLOAT8)
    yield _packed((512, 304), (64, 1), **FLOAT8)
    for device in ("sm_90a", "sm_80"):
        yield from _device_cases(device)
    latent = decode_call((2000,), capacity=2000, **LATENT)
    yield _latent("bfloat16, 16 heads on 2000 latent keys", tm.attention_decode, latent, 2000)


def listed_rows(
    indices: Tensor, counts: Tensor, block_k: int, length: int, first: int, last: int
) -> int:
    """Keys of one request that each list of [lists, entries] names, plus first and last keys,
    summed over lists."""
    total = 0
    for entries, n in zip(indices, counts, strict=True):
        seen = torch.zeros(length, dtype=torch.bool)
        seen[:first] = seen[length - last :] = True
        for block in entries[: int(n)].tolist():
            seen[block * block_k : (block + 1) * block_k] = True
        total += int(seen.sum())
    return total


def _sparse(name: str, dtype: torch.dtype = BF16, dim: int = D, **options: Any) -> CounterCase:
    """One request of 4096 keys, a list of 512 per KV head unless `options` differ, 4 first and 64
    last keys."""
    length, first, last = 4096, 4, 64
    chosen = {"lists": HK, "entries": 512, "block_k": 1, "return_mass": False} | options
    make = sparse_call(
        (length,), h=H, hk=HK, d=dim, dv=dim, capacity=length, num_sink=first, num_recent=last,
        **chosen,
    )  # fmt: skip

    def prepare() -> Callable[[], object]:
        args, kwargs = _draw(make, dtype)
        return lambda: tm.sparse_decode_attention(*args, **kwargs)

    (*_, indices, counts), _options = _draw(make, dtype)
    shared = HK // chosen["lists"] if chosen["lists"] < HK else 1
    rows = shared * listed_rows(indices[0], counts[0], chosen["block_k"], length, first, last)
    heads = max(chosen["lists"], HK)
    return _case(name, rows, H // heads, H, dim, dtype, prepare, "float8" in options)


def sparse_cases() -> Iterator[CounterCase]:
    blocks: dict[str, Any] = {"block_k": 16, "entries": 32}
    yield _sparse("tokens")
    yield _sparse("blocks of 16 in pages of 16", **blocks, page_size=16)
    yield _sparse("tokens, mass", return_mass=True)
    yield _sparse("blocks of 16, mass", **blocks, return_mass=True)
    yield _sparse("64 pairs turned, halves", pairs=64)
    yield _sparse("64 pairs turned, interleaved", pairs=64, interleaved=True)
    yield _sparse("D=64", dim=64)
    yield _sparse("list of 256 for each query head", lists=H, entries=256)
    yield _sparse("shared list of 256, float32", F32, lists=1, entries=256)
    yield _sparse("tokens, float8", **FLOAT8)
    latent = sparse_call((4096,), lists=1, entries=512, capacity=4096, return_mass=False, **LATENT)
    (*_, indices, counts), _options = _draw(latent, BF16)
    rows = listed_rows(indices[0], counts[0], 1, 4096, 0, 0)
    yield _latent("512 latent keys", tm.sparse_decode_attention, latent, rows)


DENSE = Counted(f"row; H={H}, Hk={HK}, D={D}", dense_cases)
SPARSE = Counted(f"row; bfloat16, H={H}, Hk={HK}, D={D}, lists of 512 of 4096 keys", sparse_cases)
