"""Whether a request has the same bits alone and in any batch: the test kit, for any callable."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._check import check

OP = "testing.assert_batch_invariant"
SCENARIOS = ("alone", "neighbours", "sizes", "order", "chunks", "decode", "mixed")
LENGTHS = (1, 9, 16, 33, 64, 130)
CHUNK_SIZES = (15, 16, 17, 63, 64, 65)
BORDERS = (16, 64)
STEPS = (1, 2, 3, 16, 65)  # tokens that are decoded last


@dataclass(frozen=True)
class Piece:
    """What an engine computes of one request in one step: the tokens start to stop - 1, after
    `start` earlier tokens. A whole prompt has start 0, a decode step one token.

    request: what `make_request` returned, tensors ``[tokens, ...]`` among it.

    Example:
        >>> import torch, tokenmill as tm
        >>> piece = tm.testing.Piece({"q": torch.zeros(9, 2)}, 6, 9)
        >>> piece.new("q").shape, piece.seen("q").shape
        (torch.Size([3, 2]), torch.Size([9, 2]))
    """

    request: Mapping[str, Any]
    start: int
    stop: int

    def new(self, name: str) -> Tensor:
        """The rows of the tokens start to stop - 1."""
        rows: Tensor = self.request[name]
        return rows[self.start : self.stop]

    def seen(self, name: str) -> Tensor:
        """The rows of all tokens up to stop - 1."""
        rows: Tensor = self.request[name]
        return rows[: self.stop]


Run = Callable[[list[Piece]], Sequence[Any]]


def packed(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences one after the other.

    Args:
        rows: tensors ``[n, ...]``, each with its own n.

    Returns:
        ``[T, ...]`` and cu_seqlens, int32 ``[B + 1]``.

    Example:
        >>> import torch, tokenmill as tm
        >>> tm.testing.packed([torch.zeros(3, 2), torch.zeros(5, 2)])[1]
        tensor([0, 3, 8], dtype=torch.int32)
    """
    ends = itertools.accumulate((len(t) for t in rows), initial=0)
    return torch.cat(list(rows)), torch.tensor(list(ends), dtype=torch.int32, device=rows[0].device)


def padded(
    rows: Sequence[Tensor], *, extra: int = 0, fill: float = torch.nan
) -> tuple[Tensor, Tensor]:
    """Sequences of one length, with rows that no result may depend on after their ends.

    Args:
        rows: tensors ``[n, ...]``, each with its own n.
        extra: number of rows after the end of the longest sequence.
        fill: value of these rows; 0 in tensors of integers.

    Returns:
        ``[B, N, ...]``, N = max(n) + extra, and the lengths, int32 ``[B]``.

    Example:
        >>> import torch, tokenmill as tm
        >>> batch, lengths = tm.testing.padded([torch.zeros(3, 2), torch.zeros(5, 2)])
        >>> batch.shape, lengths.tolist()
        (torch.Size([2, 5, 2]), [3, 5])
    """
    first, size = rows[0], max(len(t) for t in rows) + extra
    batch = first.new_full(
        (len(rows), size, *first.shape[1:]), fill if first.is_floating_point() else 0
    )
    for row, t in zip(batch, rows, strict=True):
        row[: len(t)] = t
    lengths = torch.tensor([len(t) for t in rows], dtype=torch.int32, device=first.device)
    return batch, lengths


def paged(
    rows: Sequence[Tensor], page_size: int, *, seed: int = 0, fill: float = torch.nan
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences in the pages of a cache, in an order that the seed draws: several tensors get the
    same pages with the same seed.

    Args:
        rows: tensors ``[n, ...]``, each with its own n.
        page_size: tokens of a page.
        seed: draws the pages; two of them belong to no sequence.
        fill: value of slots without a token.

    Returns:
        cache ``[P, page_size, ...]``, block_table int32 ``[B, pages]`` with -1 after the last page
        of a request, and the lengths, int32 ``[B]``.

    Example:
        >>> import torch, tokenmill as tm
        >>> cache, table, lengths = tm.testing.paged([torch.zeros(3, 2), torch.zeros(5, 2)], 4)
        >>> cache.shape, table.shape, lengths.tolist()
        (torch.Size([5, 4, 2]), torch.Size([2, 2]), [3, 5])
    """
    counts = [-(-len(t) // page_size) for t in rows]
    total = sum(counts) + 2
    free = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    first = rows[0]
    cache = first.new_full(
        (total, page_size, *first.shape[1:]), fill if first.is_floating_point() else 0
    )
    table = torch.full((len(rows), max(1, *counts)), -1, dtype=torch.int32)
    for line, t, count in zip(table, rows, counts, strict=True):
        for i in range(count):
            line[i] = free.pop()
            part = t[i * page_size : (i + 1) * page_size]
            cache[line[i], : len(part)] = part
    lengths = torch.tensor([len(t) for t in rows], dtype=torch.int32)
    return cache, table.to(first.device), lengths.to(first.device)


@dataclass(frozen=True)
class _Part:
    """A piece before its request is drawn: the number-th request of `tokens` tokens."""

    tokens: int
    number: int = 0
    start: int = 0
    stop: int | None = None

    @property
    def end(self) -> int:
        return self.tokens if self.stop is None else self.stop

    def __str__(self) -> str:
        whole = (self.start, self.end) == (0, self.tokens)
        name = f"{self.tokens} tokens"
        return name if whole else f"tokens {self.start} to {self.end - 1} of {self.tokens}"


def _batches(
    scenario: str, lengths: Sequence[int], chunk_sizes: Sequence[int], g: torch.Generator
) -> Iterator[list[_Part]]:
    """The batches of a scenario. Two requests of one length have different numbers."""
    mixed = [_Part(n, i) for i, n in enumerate(lengths)]
    longest = max(lengths)
    if scenario == "alone":
        yield from ([p] for p in mixed)
    elif scenario == "neighbours":
        for one in mixed:
            for n in lengths:
                for grown in (n, n + 1):
                    yield [one, _Part(grown, 90)]
                    yield [_Part(grown, 90), one]
    elif scenario == "sizes":
        for n in {lengths[0], longest}:
            for size in (2, 3, 4, 5, 8, 17):
                yield [_Part(n, i) for i in range(size)]
    elif scenario == "order":
        for _ in range(4):
            yield [mixed[i] for i in torch.randperm(len(mixed), generator=g).tolist()]
        yield [*mixed, *reversed(mixed)]
    elif scenario == "chunks":
        for size in chunk_sizes:
            for start in range(0, longest, size):
                yield [_Part(longest, 0, start, min(start + size, longest))]
    elif scenario == "decode":
        for one in mixed:
            for step in STEPS:
                if step < one.tokens:
                    yield [_Part(one.tokens, one.number, one.tokens - step)]
    else:
        for one in mixed:
            parts = [one, _Part(longest, 91, longest - 1)]
            parts += [_Part(longest, 92, cut - 1, cut + 8) for cut in BORDERS if cut + 8 < longest]
            if one.tokens > 1:
                parts.append(_Part(one.tokens, one.number, one.tokens - 1))
            yield parts
            yield parts[::-1]


def assert_batch_invariant(
    fn: Run | Mapping[str, Run],
    make_request: Callable[[int, torch.Generator], Mapping[str, Any]],
    *,
    scenarios: Sequence[str] = SCENARIOS,
    lengths: Sequence[int] = LENGTHS,
    chunk_sizes: Sequence[int] = CHUNK_SIZES,
    seed: int = 0,
) -> None:
    """Raises unless a request has the same bits alone and in every batch.

    What `fn` returns for a whole request in a batch of its own is what it must return for that
    request, or for a part of its tokens, in each of these scenarios:

    - "alone": each request in a batch of its own.
    - "neighbours": next to one request, before and after it, of each length and one token more.
    - "sizes": in batches of 2 to 17 requests of one length.
    - "order": in batches of all lengths in several orders, and with each request twice.
    - "chunks": the longest in chunks of each of `chunk_sizes` tokens.
    - "decode": the last 1, 2, 3, 16 or 65 tokens after the others.
    - "mixed": a whole prompt, chunks that begin before a border of 16 or 64 tokens, and decode
      steps in one batch.

    Padding, packing and pages (:func:`padded`, :func:`packed`, :func:`paged`) are layouts that
    `fn` chooses. To compare several, page sizes for example, give a callable for each: all must
    return what the first returns.

    Args:
        fn: takes a list of :class:`Piece`, which an engine would compute in one step, and returns a
            list with the result of each: a tensor ``[tokens, ...]`` for the tokens start to stop -
            1, or a tuple, list or dict of such tensors. In the first four scenarios all pieces are
            whole, and results may have any shape. Or a dict of such callables by their names.
        make_request: takes a number of tokens and a generator (of the CPU), and draws a request: a
            dict of what `fn` needs.
        scenarios: names from the list above.
        lengths: numbers of tokens of the requests, at least 1.
        chunk_sizes: tokens of a chunk, at least 1.
        seed: draws requests and orders.

    Raises:
        AssertionError: naming scenario, callable, request, element, both values, and how many
            elements and bits differ. Any NaN equals any NaN.
        RuntimeError: for a bad argument.

    Example:
        >>> import torch, tokenmill as tm
        >>> def make(tokens, g):
        ...     return {name: torch.randn(tokens, 4, 32, generator=g) for name in "qkv"}
        >>> def decode(pieces):
        ...     q, starts = tm.testing.packed([p.new("q") for p in pieces])
        ...     k, table, lengths = tm.testing.paged([p.seen("k") for p in pieces], 16)
        ...     v, _, _ = tm.testing.paged([p.seen("v") for p in pieces], 16)
        ...     out = tm.attention_decode(
        ...         q, k, v, seqlens_k=lengths, block_table=table, cu_seqlens_q=starts
        ...     )
        ...     return out.split([p.stop - p.start for p in pieces])
        >>> tm.testing.assert_batch_invariant(
        ...     decode, make, scenarios=("neighbours", "order"), lengths=(1, 9, 33)
        ... )
    """
    for name in scenarios:
        rule = "must be names of " + ", ".join(SCENARIOS)
        check(isinstance(name, str) and name in SCENARIOS, OP, "scenarios", rule, name)
    for name, sizes in (("lengths", lengths), ("chunk_sizes", chunk_sizes)):
        good = len(sizes) > 0 and all(isinstance(n, int) and n > 0 for n in sizes)
        check(good, OP, name, "must be one or more integers of at least 1", sizes)
    named = fn if isinstance(fn, Mapping) else {"fn": fn}
    check(len(named) > 0, OP, "fn", "must have at least one callable", list(named))
    first = next(iter(named.values()))
    requests: dict[tuple[int, int], Mapping[str, Any]] = {}
    wanted: dict[tuple[int, int], Any] = {}

    def draw(part: _Part) -> Piece:
        key = part.tokens, part.number
        if key not in requests:
            g = torch.Generator().manual_seed(seed * 2**32 + part.tokens * 100 + part.number)
            requests[key] = make_request(part.tokens, g)
            [wanted[key]] = _run(first, [Piece(requests[key], 0, part.tokens)])
        return Piece(requests[key], part.start, part.end)

    for scenario in scenarios:
        g = torch.Generator().manual_seed(seed)
        for batch in _batches(scenario, lengths, chunk_sizes, g):
            pieces = [draw(part) for part in batch]
            for name, run in named.items():
                results = _run(run, pieces)
                for i, (part, found) in enumerate(zip(batch, results, strict=True)):
                    where = _where(scenario, name, batch, i)
                    _compare(where, part, found, wanted[part.tokens, part.number])


def _run(run: Run, pieces: list[Piece]) -> list[dict[str, Tensor]]:
    """The tensors of each result by their names."""
    results = list(run(pieces))
    rule = f"must return a result for each of {len(pieces)} requests"
    check(len(results) == len(pieces), OP, "fn", rule, len(results))
    found = [dict(_tensors("", result)) for result in results]
    check(all(found), OP, "fn", "must return tensors", results)
    return found


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "result", value.detach()
    elif isinstance(value, Mapping):
        for key, v in value.items():
            yield from _tensors(f"{name}[{key!r}]" if name else str(key), v)
    elif isinstance(value, tuple | list):
        for i, v in enumerate(value):
            yield from _tensors(f"{name or 'result'}[{i}]", v)


def _where(scenario: str, run: str, batch: list[_Part], i: int) -> str:
    others = ", ".join(str(p) for p in batch)
    return f"scenario '{scenario}', {run}: request {i} of a batch of {len(batch)} ({others})"


def _compare(where: str, part: _Part, found: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    if found.keys() != whole.keys():
        raise AssertionError(f"{where}: results {list(found)}, alone {list(whole)}")
    for name, x in found.items():
        y = whole[name]
        if part.end - part.start != part.tokens:
            y = y[part.start : part.end]
        if x.shape != y.shape or x.dtype != y.dtype:
            raise AssertionError(
                f"{where}: {name} is {x.dtype} {tuple(x.shape)}, alone {y.dtype} {tuple(y.shape)}"
            )
        if problem := difference(x, y):
            raise AssertionError(f"{where}: {name}{problem}")


def difference(x: Tensor, y: Tensor) -> str:
    """The first element whose bits differ, both values, and the numbers of elements and bits that
    differ; "" if all bits agree. Any NaN equals any NaN. x and y have one shape and dtype.
    """
    if x.numel() == 0:
        return ""
    x, y = x.detach().cpu().contiguous(), y.detach().cpu().contiguous()
    bits = (x.reshape(-1, 1).view(torch.uint8) ^ y.reshape(-1, 1).view(torch.uint8)).long()
    if x.is_floating_point():
        bits[(x.isnan() & y.isnan()).flatten()] = 0
    wrong = bits.any(1)
    if not wrong.any():
        return ""
    index = int(wrong.nonzero()[0])
    place = [int(i) for i in torch.unravel_index(torch.tensor(index), x.shape)]
    number = sum(int(((bits >> i) & 1).sum()) for i in range(8))
    a, b = x.flatten()[index].item(), y.flatten()[index].item()
    return (
        f"{place} is {a!r} and alone {b!r}; {int(wrong.sum())} of {x.numel()} elements differ, "
        f"in {number} bits"
    )
