"""The engine of examples/serve.py: schedules the tokens of a model step and places their keys.

A step is one pass of the model, and one attention call per layer, over the newest token of every
text that is being continued and the next piece of a prompt. Texts with equal beginnings share
pages. When pages run out, the request that arrived last releases its pages and waits.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import tokenmill as tm
from tokenmill.demo.language_model import LanguageModel

# (layer, new q, k, v [T, H, D]) -> attention output [T, H, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Request:
    """codes: the prompt and the generated tokens, the first `held` of which are in the cache."""

    codes: list[int]
    last: int  # final length
    arrival: int  # step before which it arrives
    pages: list[int] = field(default_factory=list)
    held: int = 0
    logs: list[float] = field(default_factory=list)  # log-probabilities of generated tokens
    evicted: bool = False


@torch.inference_mode()
def greedy(model: LanguageModel, codes: list[int], rows: list[int], attend: Attend) -> Iterator:
    """Most likely next token after the tokens `rows` of codes [T], and its log-probability."""
    x = model.embedding(torch.tensor(codes))[None]
    for number, block in enumerate(model.blocks):
        layer = block.attention
        q, k, v = (t[0] for t in layer.project(block.norm_attention(x)))
        x = x + layer.out(layer.norm_head(attend(number, q, k, v)).flatten(1))
        x = x + block.mlp(block.norm_mlp(x))
    logits = model.head(model.norm(x[0, rows]))
    logs, found = torch.log_softmax(logits, -1).max(-1)
    return zip(found.tolist(), logs.tolist(), strict=True)


class Pages:
    """Pages of `size` tokens each, with their number of users. A full page is registered under the
    text up to its end, even without users, until it is reused for another text."""

    def __init__(self, count: int, size: int):
        self.size = size
        self.users = [0] * count
        self.free = dict.fromkeys(range(count))  # in the order of reuse
        self.page_of: dict[bytes, int] = {}
        self.text_of: dict[int, bytes] = {}

    def take(self) -> int:
        page = next(iter(self.free))
        del self.free[page]
        self.page_of.pop(self.text_of.pop(page, b""), None)
        self.users[page] = 1
        return page

    def share(self, codes: list[int]) -> list[int]:
        """The full pages registered for the beginning of codes; adds a user to each."""
        found: list[int] = []
        for end in range(self.size, len(codes) + 1, self.size):
            page = self.page_of.get(bytes(codes[:end]))
            if page is None:
                break
            found.append(page)
            self.users[page] += 1
            self.free.pop(page, None)
        return found

    def publish(self, codes: list[int], pages: list[int], begin: int) -> None:
        """Registers the pages that codes fill; pages before token `begin` are registered
        already."""
        for number in range(begin // self.size, len(codes) // self.size):
            known = bytes(codes[: (number + 1) * self.size])
            if self.page_of.setdefault(known, pages[number]) == pages[number]:
                self.text_of[pages[number]] = known

    def give_back(self, pages: list[int]) -> None:
        for page in reversed(pages):  # ends are reused before beginnings, which more texts share
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free[page] = None


class Engine:
    """Serves requests in order of arrival. All running requests except the last have read their
    prompts, since nothing is admitted after a prompt that uses up the step's budget."""

    def __init__(self, model: LanguageModel, pages: int, page_size: int, seats: int, budget: int):
        if not 1 <= seats <= budget:
            raise ValueError(f"seats: must be 1 to the budget, {budget}; got {seats}")
        self.model, self.seats, self.budget = model, seats, budget
        self.pages = Pages(pages, page_size)
        layers = [block.attention for block in model.blocks]
        self.slopes = layers[0].slopes
        head_dim = layers[0].norm_head.normalized_shape[0]
        self.caches = torch.empty(len(layers), 2, pages, page_size, layers[0].heads, head_dim)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.counts: Counter[str] = Counter()

    def submit(self, request: Request) -> None:
        room = len(self.pages.users) * self.pages.size  # the last token is never in the cache
        if not 1 <= len(request.codes) < request.last <= room + 1:
            rule = f"must have a prompt, tokens to generate, and at most {room + 1} of both"
            raise ValueError(f"request: {rule}; got {len(request.codes)} of {request.last}")
        self.waiting.append(request)

    def step(self) -> list[Request]:
        """One pass of the model. Returns the requests that ended with it."""
        batch = self.schedule()
        for (request, count), (code, log) in zip(batch, self.forward(batch), strict=True):
            request.held += count
            if request.held == len(request.codes):
                request.codes.append(code)
                request.logs.append(log)
        ended = [request for request, _ in batch if len(request.codes) == request.last]
        for request in ended:
            self.running.remove(request)
            self.release(request)
        self.counts.update(steps=1, tokens=sum(count for _, count in batch))
        return ended

    def schedule(self) -> list[tuple[Request, int]]:
        """The requests of a step, and the number of tokens of each."""
        batch: list[tuple[Request, int]] = []
        left, evictions = self.budget, self.counts["evictions"]
        while len(batch) < len(self.running):
            request = self.running[len(batch)]
            if count := self.allot(request, left):
                batch.append((request, count))
                left -= count
            else:
                self.evict()  # the last request, which may be this one
        if self.counts["evictions"] > evictions:
            return batch
        while left and self.waiting and len(self.running) < self.seats:
            request = self.waiting[0]
            # The logits of the last token are needed, so it is always computed. Pages that this
            # step fills may be shared, since a layer stores all keys in its cache before it
            # attends.
            request.pages = self.pages.share(request.codes[:-1])
            request.held = len(request.pages) * self.pages.size
            count = self.allot(request, left)
            if not count:
                self.release(request)
                break
            self.counts["found again" if request.evicted else "shared"] += request.held
            self.running.append(self.waiting.popleft())
            batch.append((request, count))
            left -= count
        return batch

    def allot(self, request: Request, most: int) -> int:
        """Takes pages for the next tokens of a request. Returns the number of tokens, 0 if pages
        are lacking."""
        count = min(len(request.codes) - request.held, most)
        end = request.held + count
        need = -(-end // self.pages.size) - len(request.pages)
        if need > len(self.pages.free):
            return 0
        request.pages += [self.pages.take() for _ in range(need)]
        self.pages.publish(request.codes[:end], request.pages, request.held)
        return count

    def evict(self) -> None:
        """The request that arrived last loses its place in the cache, and is the next to get
        one."""
        request = self.running.pop()
        request.evicted = True
        self.release(request)
        self.waiting.appendleft(request)
        self.counts["evictions"] += 1

    def release(self, request: Request) -> None:
        self.pages.give_back(request.pages)
        request.pages, request.held = [], 0

    def forward(self, batch: list[tuple[Request, int]]) -> Iterator[tuple[int, float]]:
        """The next token of each request."""
        size = self.pages.size
        spans = [(request, request.held, request.held + count) for request, count in batch]
        codes = [code for request, begin, end in spans for code in request.codes[begin:end]]
        places = [(request, t) for request, begin, end in spans for t in range(begin, end)]
        # [T], page * page_size + offset
        slots = torch.tensor([r.pages[t // size] * size + t % size for r, t in places])
        starts = list(itertools.accumulate((count for _, count in batch), initial=0))
        widest = max(len(request.pages) for request, _ in batch)
        table = [request.pages + [-1] * (widest - len(request.pages)) for request, _ in batch]
        cu_seqlens_q, seqlens_k, block_table = (
            torch.tensor(ints, dtype=torch.int32)
            for ints in (starts, [end for _, _, end in spans], table)
        )

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_cache, v_cache = self.caches[number]
            tm.kv_cache_append(k_cache, v_cache, k, v, slots)
            return tm.attention(
                q, k_cache, v_cache, causal=True, alibi_slopes=self.slopes,
                cu_seqlens_q=cu_seqlens_q, seqlens_k=seqlens_k, block_table=block_table,
            )  # fmt: skip

        return greedy(self.model, codes, [start - 1 for start in starts[1:]], attend)
