"""How operators on sequences run a batch of requests, for the test kit.

A run takes the pieces of a batch and `backend`, and returns the results of each piece, tokens
first. Operators that want equally many queries of each request run the pieces in groups.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import tokenmill as tm

from .._invariance import Piece, packed, padded, paged
from .rows import elsewhere

Run = Callable[..., list[Any]]
Place = int | str  # where keys are: a page size, "packed", "padded" or "wide" (padded with room)

HEADS, KV_HEADS, D, DV = 4, 2, 32, 24
BLOCK = 16  # tokens of a block or chunk
MAX_TOKENS = 720
HIP: dict[str, Any] = {"budget": 32, "block_k": 2, "num_sink": 4, "num_recent": 16}
SPARSE: dict[str, Any] = {"block_k": BLOCK, "num_sink": 4, "num_recent": 20}
MODS: dict[str, Any] = {
    "window": (40, 0),
    "softcap": 5.0,
    "alibi_slopes": torch.arange(HEADS) / 16.0,
}
MODS["sink"] = torch.arange(HEADS) - 1.0
DELTA = ("q", "wide_k", "wide_v", "beta", "log_decay")
TITANS = ("q", "wide_k", "wide_v", "alpha", "eta", "theta")


def prompt(tokens: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """A request: for each token a query, a key, a value, and gates of recurrences."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, generator=g).to(dtype)

    def gate(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(tokens, HEADS, generator=g)

    return {
        "q": draw(HEADS, D), "k": draw(KV_HEADS, D), "v": draw(KV_HEADS, DV),
        "wide_k": functional.normalize(draw(HEADS, D), dim=-1), "wide_v": draw(HEADS, DV),
        "log_decay": gate(-1, 0), "alpha": gate(0, 0.1), "eta": gate(0, 0.9),
        "theta": gate(0, 0.1), "weights": draw(HEADS), "gates": draw(HEADS, 3),
        "dout": draw(HEADS, DV), "beta": gate(0, 1),
    }  # fmt: skip


def ties(tokens: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """A request in which only rounding orders the blocks of keys: queries are constant, and keys
    are permutations of one key, equal within a block.
    """
    request = prompt(tokens, g, dtype)
    request["q"] = request["q"][..., :1].expand(-1, -1, D).contiguous()
    key = torch.randn(D, generator=g).to(dtype)
    blocks = torch.stack([key[torch.randperm(D, generator=g)] for _ in range(0, tokens, BLOCK)])
    each = blocks.repeat_interleave(BLOCK, 0)[:tokens, None]
    request["k"] = each.expand(-1, KV_HEADS, -1).contiguous()
    return request


def last(run: Run, count: int) -> Run:
    """The last `count` tokens of each request: decode steps with several queries."""

    def of_parts(pieces: list[Piece], **options: Any) -> list[Any]:
        return run([Piece(p.request, p.stop - count, p.stop) for p in pieces], **options)

    return of_parts


def each(run: Run) -> Run:
    """The tokens of all pieces as pieces of their own, in one batch."""

    def of_tokens(pieces: list[Piece], **options: Any) -> list[Any]:
        tokens = [Piece(p.request, t, t + 1) for p in pieces for t in range(p.start, p.stop)]
        found = iter(run(tokens, **options))
        parts = [itertools.islice(found, p.stop - p.start) for p in pieces]
        return [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]

    return of_tokens


def either(whole: Run, part: Run) -> Run:
    """Whole prompts by one run and parts of prompts by another, a piece at a time."""

    def one(p: Piece, **options: Any) -> Any:
        [result] = (whole if p.stop - p.start == len(p.request["q"]) else part)([p], **options)
        return result

    return lambda pieces, **options: [one(p, **options) for p in pieces]


def by_head(run: Run) -> Run:
    """Each KV head, with its query heads, in calls of its own."""

    def heads(p: Piece, h: int) -> Piece:
        own = {n: p.request[n].tensor_split(KV_HEADS, 1)[h] for n in "qkv"}
        return Piece({**p.request, **own}, p.start, p.stop)

    def of_heads(pieces: list[Piece], **options: Any) -> list[Any]:
        each = [run([heads(p, h) for p in pieces], **options) for h in range(KV_HEADS)]
        return [
            tuple(torch.cat(r, 1) for r in zip(*p, strict=True)) for p in zip(*each, strict=True)
        ]

    return of_heads


def gradients(run: Run, *names: str) -> Run:
    """The gradients of each request's tensors, with "dout" for the gradient of the first result."""

    def of_batch(pieces: list[Piece], **options: Any) -> list[Any]:
        leaves = [{n: p.request[n].clone().requires_grad_() for n in names} for p in pieces]
        own = [Piece({**p.request, **t}, 0, p.stop) for p, t in zip(pieces, leaves, strict=True)]
        outs = [result[0] for result in run(own, **options)]
        wanted = [t for given in leaves for t in given.values()]
        found = torch.autograd.grad(outs, wanted, [p.new("dout") for p in pieces])
        return [found[i : i + len(names)] for i in range(0, len(found), len(names))]

    return of_batch


def grouped(run: Callable[[list[Piece]], Sequence[Any]], pieces: list[Piece]) -> list[Any]:
    """Runs pieces with equally many tokens together."""
    groups = defaultdict(list)
    for i, p in enumerate(pieces):
        groups[p.stop - p.start].append(i)
    found: list[Any] = [None] * len(pieces)
    for places in groups.values():
        for i, result in zip(places, run([pieces[i] for i in places]), strict=True):
            found[i] = result
    return found


def new(pieces: list[Piece], *names: str) -> list[Tensor]:
    """Rows of the pieces' tokens, packed."""
    return [packed([p.new(name) for p in pieces])[0] for name in names]


def stacked(pieces: list[Piece], *names: str) -> list[Tensor]:
    """Rows of pieces with equally many tokens, [B, tokens, ...]."""
    return [torch.stack([p.new(name) for p in pieces]) for name in names]


def starts(pieces: list[Piece]) -> Tensor:
    return packed([p.new("q") for p in pieces])[1]


def split(pieces: list[Piece], *results: Tensor) -> list[Any]:
    """Packed results by pieces."""
    sizes = [p.stop - p.start for p in pieces]
    return list(zip(*(r.split(sizes) for r in results), strict=True))


def seen(pieces: list[Piece], place: Place, *names: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Keys up to the pieces' last tokens, and the keywords that say where they are."""
    rows = [[p.seen(name) for p in pieces] for name in names]
    if place == "packed":
        return [packed(r)[0] for r in rows], {"cu_seqlens_k": packed(rows[0])[1]}
    if isinstance(place, int):
        laid = [paged(r, place, seed=place) for r in rows]
        where = {"block_table": laid[0][1], "seqlens_k": laid[0][2]}
        return [cache for cache, _, _ in laid], where
    filled = [padded(r, extra=70 if place == "wide" else 0) for r in rows]
    return [t for t, _ in filled], {"seqlens_k": filled[0][1]}


def prompts(
    function: Callable[..., Any], names: Sequence[str] = "qkv", *, strided: bool = False,
    **options: Any,
) -> Run:  # fmt: skip
    """Whole prompts of a function of [B, S, H, D], in groups of one length."""

    def run(pieces: list[Piece], *, backend: str) -> list[Any]:
        def group(some: list[Piece]) -> list[Any]:
            given = [elsewhere(t) if strided else t for t in stacked(some, *names)]
            return [(r,) for r in function(*given, backend=backend, **options)]

        return grouped(group, pieces)

    return run


def chunks(function: Callable[..., Any], names: Sequence[str] = "q", **options: Any) -> Run:
    """Pieces of prompts of a function that aligns queries with the last keys."""

    def one(p: Piece, backend: str) -> Any:
        q, *more = (p.new(name)[None] for name in names)
        k, v = p.seen("k")[None], p.seen("v")[None]
        return (function(q, k, v, *more, backend=backend, **options)[0],)

    return lambda pieces, *, backend: [one(p, backend) for p in pieces]


# dense


def attention(
    pieces: list[Piece], *, backend: str, place: Place = "packed", **mods: Any
) -> list[Any]:
    [q], ([k, v], where) = new(pieces, "q"), seen(pieces, place, "k", "v")
    out, lse = tm.attention(
        q, k, v, causal=True, cu_seqlens_q=starts(pieces), return_lse=True, backend=backend,
        **where, **mods,
    )  # fmt: skip
    return split(pieces, out, lse.T)


def dense_attention(pieces: list[Piece], *, backend: str, **mods: Any) -> list[Any]:
    """Each piece in a call of its own."""

    def one(p: Piece) -> Any:
        q, k, v = p.new("q")[None], p.seen("k")[None], p.seen("v")[None]
        out, lse = tm.attention(q, k, v, causal=True, return_lse=True, backend=backend, **mods)
        return out[0], lse[0].T

    return [one(p) for p in pieces]


def padded_attention(pieces: list[Piece], *, backend: str, extra: int = 0) -> list[Any]:
    """Whole prompts: causal rows see no padding after them."""
    q, k, v = (padded([p.new(n) for p in pieces], extra=extra)[0] for n in "qkv")
    out, lse = tm.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    return [(o[: p.stop], s[:, : p.stop].T) for o, s, p in zip(out, lse, pieces, strict=True)]


def attention_decode(
    pieces: list[Piece], *, backend: str, place: Place = 16, **mods: Any
) -> list[Any]:
    [q], ([k, v], where) = new(pieces, "q"), seen(pieces, place, "k", "v")
    out, lse = tm.attention_decode(
        q, k, v, cu_seqlens_q=starts(pieces), return_lse=True, backend=backend, **where, **mods
    )
    return split(pieces, out, lse.T)


def attention_steps(
    pieces: list[Piece], *, backend: str, place: Place = 16, **mods: Any
) -> list[Any]:
    """attention_decode of [B, S, H, D]."""

    def group(some: list[Piece]) -> list[Any]:
        [q], ([k, v], where) = stacked(some, "q"), seen(some, place, "k", "v")
        out, lse = tm.attention_decode(q, k, v, return_lse=True, backend=backend, **where, **mods)
        return list(zip(out, lse.transpose(1, 2), strict=True))

    return grouped(group, pieces)


# linear


def linear_state(p: Piece, backend: str) -> Tensor:
    """The state before a piece: its past in one call."""
    if not p.start:
        return torch.zeros(1, HEADS, D, DV)
    *qkv, decay = (p.request[n][None, : p.start] for n in ("q", "k", "v", "log_decay"))
    return tm.linear_attention(*qkv, log_decay=decay, return_final_state=True, backend=backend)[1]


def linear(pieces: list[Piece], *, backend: str) -> list[Any]:
    *qkv, decay = new(pieces, "q", "k", "v", "log_decay")
    state = torch.cat([linear_state(p, backend) for p in pieces])
    out = tm.linear_attention(
        *qkv, log_decay=decay, initial_state=state, cu_seqlens=starts(pieces), backend=backend
    )
    return split(pieces, out)


def padded_linear(pieces: list[Piece], *, backend: str, extra: int = 0) -> list[Any]:
    names = ("q", "k", "v", "log_decay")
    *qkv, decay = (padded([p.new(n) for p in pieces], extra=extra)[0] for n in names)
    state = torch.zeros(len(pieces), HEADS, D, DV)
    out = tm.linear_attention(
        *qkv, log_decay=decay.nan_to_num(), initial_state=state, backend=backend
    )
    return [(o[: p.stop],) for o, p in zip(out, pieces, strict=True)]


def slots(count: int, apart: bool) -> tuple[Tensor, int]:
    """Slots of states and how many there are. apart: in reverse order, with a slot between two."""
    size = 2 * count
    return torch.arange(size)[1::2].flip(0).int() if apart else torch.arange(count).int(), size


def linear_steps(
    pieces: list[Piece], *, backend: str, tokens: int = 1, apart: bool = False
) -> list[Any]:
    """linear_attention_decode, so many tokens in a call."""

    def group(some: list[Piece]) -> list[Any]:
        given = stacked(some, "q", "k", "v", "log_decay")
        own, size = slots(len(some), apart)
        state = torch.full((size, HEADS, D, DV), torch.nan)
        state[own] = torch.cat([linear_state(p, backend) for p in some])
        outs = []
        for q, k, v, decay in zip(*(t.split(tokens, 1) for t in given), strict=True):
            outs.append(
                tm.linear_attention_decode(
                    q, k, v, state, log_decay=decay, state_indices=own, backend=backend
                )
            )
        return [(o,) for o in torch.cat(outs, 1)]

    return grouped(group, pieces)


def delta_state(p: Piece, backend: str) -> Tensor:
    if not p.start:
        return torch.zeros(1, HEADS, D, DV)
    q, k, v, beta, decay = (p.request[n][None, : p.start] for n in DELTA)
    return tm.delta_attention(
        q, k, v, beta, log_decay=decay, return_final_state=True, backend=backend
    )[1]


def delta(pieces: list[Piece], *, backend: str) -> list[Any]:
    q, k, v, beta, decay = new(pieces, *DELTA)
    state = torch.cat([delta_state(p, backend) for p in pieces])
    out = tm.delta_attention(
        *(q, k, v, beta), log_decay=decay, initial_state=state, cu_seqlens=starts(pieces),
        backend=backend,
    )  # fmt: skip
    return split(pieces, out)


def delta_steps(
    pieces: list[Piece], *, backend: str, tokens: int = 1, apart: bool = False
) -> list[Any]:
    """delta_attention_decode, so many tokens in a call."""

    def group(some: list[Piece]) -> list[Any]:
        given = stacked(some, *DELTA)
        own, size = slots(len(some), apart)
        state = torch.full((size, HEADS, D, DV), torch.nan)
        state[own] = torch.cat([delta_state(p, backend) for p in some])
        outs = []
        for q, k, v, beta, decay in zip(*(t.split(tokens, 1) for t in given), strict=True):
            outs.append(
                tm.delta_attention_decode(
                    q, k, v, beta, state, log_decay=decay, state_indices=own, backend=backend
                )
            )
        return [(o,) for o in torch.cat(outs, 1)]

    return grouped(group, pieces)


def _taps(like: Tensor) -> Tensor:
    """A filter of four taps for each channel."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(like.shape[1:].numel(), 4, generator=g).to(like.dtype)


def conv_state(p: Piece) -> Tensor:
    """The three tokens before a piece, [1, C, 3]."""
    before = p.request["wide_v"][max(p.start - 3, 0) : p.start].flatten(1)
    return functional.pad(before.T, (3 - len(before), 0))[None]


def conv(pieces: list[Piece], *, backend: str) -> list[Any]:
    (x,) = new(pieces, "wide_v")
    out = tm.causal_conv1d(
        x.flatten(1), _taps(x), activation="silu", cu_seqlens=starts(pieces), backend=backend,
        initial_state=torch.cat([conv_state(p) for p in pieces]),
    )  # fmt: skip
    return split(pieces, out.reshape(x.shape))


def conv_steps(
    pieces: list[Piece], *, backend: str, tokens: int = 1, apart: bool = False
) -> list[Any]:
    """causal_conv1d_decode, so many tokens in a call."""

    def group(some: list[Piece]) -> list[Any]:
        (x,) = stacked(some, "wide_v")
        own, size = slots(len(some), apart)
        state = torch.full((size, HEADS * DV, 3), torch.nan, dtype=x.dtype)
        state[own] = torch.cat([conv_state(p) for p in some])
        taps = _taps(x[0])
        outs = [
            tm.causal_conv1d_decode(
                part, state, taps, activation="silu", state_indices=own, backend=backend
            )
            for part in x.flatten(2).split(tokens, 1)
        ]
        return [(o,) for o in torch.cat(outs, 1).view_as(x)]

    return grouped(group, pieces)


def titans_state(p: Piece, backend: str) -> tuple[Tensor, Tensor]:
    if not p.start:
        return torch.zeros(1, HEADS, D, DV), torch.zeros(1, HEADS, D, DV)
    q, k, v, alpha, eta, theta = (p.request[n][None, : p.start] for n in TITANS)
    return tm.titans_memory(
        q, k, v, alpha=alpha, eta=eta, theta=theta, chunk_size=BLOCK, return_final_state=True,
        backend=backend,
    )[1]  # fmt: skip


def titans(pieces: list[Piece], *, backend: str) -> list[Any]:
    q, k, v, alpha, eta, theta = new(pieces, *TITANS)
    states = [titans_state(p, backend) for p in pieces]
    memory, momentum = map(torch.cat, zip(*states, strict=True))
    out = tm.titans_memory(
        q, k, v, alpha=alpha, eta=eta, theta=theta, chunk_size=BLOCK,
        initial_state=(memory, momentum), cu_seqlens=starts(pieces), backend=backend,
    )  # fmt: skip
    return split(pieces, out)


def titans_steps(
    pieces: list[Piece], *, backend: str, tokens: int = 1, apart: bool = False
) -> list[Any]:
    """titans_memory_decode of whole requests, so many tokens in a call. It takes no backend."""

    def group(some: list[Piece]) -> list[Any]:
        own, size = slots(len(some), apart)
        start, memory, momentum = torch.zeros(3, size, HEADS, D, DV)
        filled = torch.zeros(size, dtype=torch.int32)
        outs = []
        given = (t.split(tokens, 1) for t in stacked(some, *TITANS))
        for q, k, v, alpha, eta, theta in zip(*given, strict=True):
            outs.append(
                tm.titans_memory_decode(
                    q, k, v, start, memory, momentum, filled, alpha=alpha, eta=eta, theta=theta,
                    chunk_size=BLOCK, state_indices=own,
                )
            )  # fmt: skip
        return [(o,) for o in torch.cat(outs, 1)]

    return grouped(group, pieces)


# select


def hip_lists(
    pieces: list[Piece], *, backend: str, place: Place = "packed", block_q: int = BLOCK
) -> list[Any]:
    """For each token the list of its block of queries."""
    [q], ([k], where), at = new(pieces, "q"), seen(pieces, place, "k"), starts(pieces)
    indices, counts = tm.hip_block_select(
        q, k, block_q=block_q, cu_seqlens_q=at, backend=backend, **HIP, **where
    )
    found = []
    for b, p in enumerate(pieces):
        rows = int(at[b]) // block_q + b + torch.arange(p.stop - p.start) // block_q
        found.append((indices[:, rows].transpose(0, 1), counts[:, rows].T))
    return found


def indexer(pieces: list[Piece], *, backend: str, place: Place = "packed") -> list[Any]:
    (q, weights), ([k], where) = new(pieces, "q", "weights"), seen(pieces, place, "k")
    found = tm.indexer_topk_select(
        q, k[..., 0, :], weights, 12, num_sink=2, num_recent=4, cu_seqlens_q=starts(pieces),
        return_values=True, backend=backend, **where,
    )  # fmt: skip
    return split(pieces, *found)


def block_scores(pieces: list[Piece], *, backend: str, place: Place = "padded") -> list[Any]:
    """Scores of each key, -inf up to MAX_TOKENS."""

    def group(some: list[Piece]) -> list[Any]:
        [q], ([k], where) = stacked(some, "q"), seen(some, place, "k")
        scores = tm.kv_block_scores(q, k, causal=True, backend=backend, **where)
        room = MAX_TOKENS + BLOCK - scores.shape[-1]
        wide = functional.pad(scores, (0, room), value=-torch.inf)
        return [(s.transpose(0, 1),) for s in wide]

    return grouped(group, pieces)


def pooled(pieces: list[Piece], *, backend: str, place: Place = "padded") -> list[Any]:
    """Means of the blocks of keys of whole requests."""
    [k], where = seen(pieces, place, "k")
    lengths = where.pop("seqlens_k")
    means = tm.block_pool_keys(k, BLOCK, lengths=lengths, backend=backend, **where)
    return [(m[: -(-p.stop // BLOCK)],) for m, p in zip(means, pieces, strict=True)]


def pooled_again(pieces: list[Piece], *, backend: str, tokens: int) -> list[Any]:
    """The same means by block_pool_keys_update after every so many tokens."""

    def one(p: Piece) -> Any:
        k = p.seen("k")[None]
        means = torch.zeros(1, -(-p.stop // BLOCK), KV_HEADS, D).to(k)
        for first in range(0, p.stop, tokens):
            start, end = (torch.tensor([n]).int() for n in (first, min(first + tokens, p.stop)))
            tm.block_pool_keys_update(k, means, BLOCK, start=start, lengths=end, backend=backend)
        return (means[0],)

    return [one(p) for p in pieces]


def appended(pieces: list[Piece], *, backend: str, place: int = 16) -> list[Any]:
    """The rows of a float8 cache, and their scales, that kv_cache_append wrote."""
    k, v = new(pieces, "k", "v")
    pages = -(-len(k) // place) + 1
    own = torch.randperm(pages * place, generator=torch.Generator().manual_seed(place))[: len(k)]
    k_cache, v_cache = (
        torch.zeros(pages, place, *t.shape[1:]).to(torch.float8_e4m3fn) for t in (k, v)
    )
    k_scale, v_scale = torch.ones(2, pages, place, KV_HEADS)
    tm.kv_cache_append(
        k_cache, v_cache, k, v, own, k_scale=k_scale, v_scale=v_scale, backend=backend
    )
    written = (k_cache.view(torch.uint8), v_cache.view(torch.uint8), k_scale, v_scale)
    rows = (t.flatten(0, 1)[own] for t in written)
    return split(pieces, *rows)


# sparse


def listed(token: int) -> Tensor:
    """Every third block before a token."""
    block = token // BLOCK
    return torch.arange(block % 3, block, 3, dtype=torch.int32)


def block_sparse(
    pieces: list[Piece], *, backend: str, place: Place = "packed", block_q: int = BLOCK
) -> list[Any]:
    """Each block of queries has the list of its first token."""
    at = starts(pieces)
    rows = int(at[-1]) // block_q + len(pieces)
    indices = torch.full((1, rows, MAX_TOKENS // BLOCK // 3), -1, dtype=torch.int32)
    counts = torch.zeros(1, rows, dtype=torch.int32)
    for b, p in enumerate(pieces):
        first = int(at[b]) // block_q + b
        for row, token in enumerate(range(p.start, p.stop, block_q), first):
            ids = listed(token)
            indices[0, row, : len(ids)], counts[0, row] = ids, len(ids)
    [q], ([k, v], where) = new(pieces, "q"), seen(pieces, place, "k", "v")
    out, lse = tm.block_sparse_attention(
        q, k, v, indices, counts, block_q=block_q, causal=True, cu_seqlens_q=at, return_lse=True,
        backend=backend, **SPARSE, **where,
    )  # fmt: skip
    return split(pieces, out, lse.T)


def sparse_decode(pieces: list[Piece], *, backend: str, place: Place = "padded") -> list[Any]:
    """Each piece has the list of its first token."""

    def group(some: list[Piece]) -> list[Any]:
        ids, counts = padded([listed(p.start) for p in some], extra=1)
        [q], ([k, v], where) = stacked(some, "q"), seen(some, place, "k", "v")
        out, lse = tm.sparse_decode_attention(
            q, k, v, ids[:, None], counts[:, None], backend=backend, **SPARSE, **where
        )
        return list(zip(out, lse.transpose(1, 2), strict=True))

    return grouped(group, pieces)


def landmark_decode(
    pieces: list[Piece], *, backend: str, place: Place = "padded", topk: int | None = None
) -> list[Any]:
    def group(some: list[Piece]) -> list[Any]:
        [q], ([k, v], where) = stacked(some, "q"), seen(some, place, "k", "v")
        out = tm.landmark_decode(q, k, v, block=BLOCK, topk=topk, backend=backend, **where)
        return [(o,) for o in out]

    return grouped(group, pieces)


def core_steps(pieces: list[Piece], *, backend: str) -> list[Any]:
    """The tokens of a piece one by one by CoreContextState, after a prefill of its past."""

    def one(p: Piece) -> Any:
        state = tm.sparse.CoreContextState(window=32, group=8, backend=backend)
        rows = [p.request[n][None] for n in "qkv"]
        if p.start:
            state.prefill(*(t[:, : p.start] for t in rows))
        outs = [state.step(*(t[:, i : i + 1] for t in rows)) for i in range(p.start, p.stop)]
        return (torch.cat(outs, 1)[0],)

    return [one(p) for p in pieces]


def hip(pieces: list[Piece], *, backend: str, place: Place = "packed") -> list[Any]:
    [q], ([k, v], where) = new(pieces, "q"), seen(pieces, place, "k", "v")
    out, lse = tm.hip_attention(
        q, k, v, block_q=BLOCK, cu_seqlens_q=starts(pieces), return_lse=True, backend=backend,
        **HIP, **where,
    )  # fmt: skip
    return split(pieces, out, lse.T)
