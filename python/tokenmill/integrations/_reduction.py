"""Token reduction in vision transformer blocks, between attention and MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .._check import as_int, as_number, check, check_bool
from ..dense.attention import attention
from ..nn.class_token import EViTReorganize
from ..tokens.bipartite_match import bipartite_match
from ..tokens.merge_tokens import merge_tokens, unmerge_tokens

KEEP = "_tokenmill_reduction"


@dataclass(eq=False)
class Reduction:
    """The token reduction of the last call of a patched model.

    Attributes:
        merge: number of tokens to merge in each block, or None.
        keep_rate: fraction of patches to keep in each block, 1 where all are kept, or None.
        prefix: number of tokens before the patches (class, distillation, registers), which stay
            first.
        source: int32. With merge ``[B, N]``, the result row of each token; with keep_rate ``[B,
            rows - prefix]``, the patch of each row, -1 for the fused token.
        size: float32 ``[B, rows]`` with merge, number of tokens in each row.

    Checkpointed blocks, recomputed in the backward, reuse the results of the last call of the
    model: the backward must run before the next call.
    """

    merge: list[int] | None
    keep_rate: list[float] | None
    prefix: int
    fuse: bool = True
    backend: str | None = None
    # Results after each block: a recomputed block (checkpointing) reuses its earlier input.
    _sizes: dict[int, Tensor | None] = field(default_factory=dict, repr=False)
    _sources: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> Tensor:
        rule = "is known after a call of the model"
        check(len(self._sources) > 0, "integrations.Reduction", "source", rule, None)
        return self._sources[max(self._sources)]

    @property
    def size(self) -> Tensor | None:
        return self._sizes.get(max(self._sizes, default=0))

    def unmerge(self, y: Tensor) -> Tensor:
        """``[B, rows, C] -> [B, N, C]``: copies to each merged token its row."""
        check(self.merge is not None, "integrations.Reduction", "merge", "must be given", None)
        return unmerge_tokens(y, self.source, backend=self.backend)

    def attend(
        self, block: int, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """Attention [B, N, H, D]; each key counts as many times as there are tokens in it."""
        size = self._sizes.get(block - 1) if block > 0 else None
        alone = self.merge is None or not any(self.merge[:block])  # every row is a single token
        bias = None if size is None or alone else size.log()[:, None, None]
        if dropout > 0:  # no kernel drops weights
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            mask = None if bias is None else bias.to(q.dtype)
            dropped = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale
            )
            return dropped.transpose(1, 2)
        out = attention(q, k, v, bias=bias, scale=scale, backend=self.backend)
        assert isinstance(out, Tensor)
        return out

    def reduce(self, block: int, x: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """x [B, N, C] after the attention of a block, with fewer rows."""
        # A block recomputed in the backward keeps the results of later blocks.
        compiles = torch.compiler.is_compiling()
        if block == 0 and (compiles or torch._C._current_graph_task_id() == -1):
            self._sizes, self._sources = {}, {}
        if self.keep_rate is not None:
            return self._keep(block, x, q, k, scale, self.keep_rate[block])
        assert self.merge is not None
        return self._merge(block, x, k, self.merge[block])

    def _merge(self, block: int, x: Tensor, k: Tensor, r: int) -> Tensor:
        n = self.prefix
        size, source = self._sizes.get(block - 1), self._sources.get(block - 1)
        if size is None or source is None:
            size = torch.ones(x.shape[:2], device=x.device)
            every = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
            source = every.expand(x.shape[0], -1)
        self._sizes[block], self._sources[block] = size, source
        if r == 0:
            return x
        assign, rows, _ = bipartite_match(
            k.detach().mean(2), r, protect_first=n, protect_targets=n // 2, backend=self.backend
        )
        # Moves the prefix tokens to the front again; the odd ones are destinations.
        front = assign[:, :n]
        before = (front[:, None] < assign[..., None]).sum(2, dtype=torch.int32)
        assign = assign + n - before
        assign[:, :n] = torch.arange(n, dtype=torch.int32, device=x.device)
        x = x if x.stride(2) == 1 else x.contiguous()
        y, self._sizes[block] = merge_tokens(x, assign, rows, weight=size, backend=self.backend)
        self._sources[block] = assign.gather(1, source.long())
        return y

    def _keep(
        self, block: int, x: Tensor, q: Tensor, k: Tensor, scale: float, rate: float
    ) -> Tensor:
        n = self.prefix
        source = self._sources.get(block - 1)
        if source is None:
            patches = torch.arange(x.shape[1] - n, dtype=torch.int32, device=x.device)
            source = patches.expand(x.shape[0], -1)
        self._sources[block] = source
        if rate == 1:
            return x
        layer = EViTReorganize(rate, fuse=self.fuse, backend=self.backend)
        scores = layer.scores(q, k, scale)[:, n - 1 :]
        y, keep = layer(torch.cat([x[:, :1], x[:, n:]], 1), scores)
        source = source.gather(1, keep.long())
        if source.shape[1] < y.shape[1] - 1:
            source = torch.cat([source, source.new_full((len(source), 1), -1)], 1)
        self._sources[block] = source
        return torch.cat([y[:, :1], x[:, 1:n], y[:, 1:]], 1) if n > 1 else y


def make_reduction(
    name: str, depth: int, prefix: int, class_token: bool, merge: Any, keep_rate: Any,
    layers: Sequence[int] | None, fuse: bool, backend: str | None,
) -> Reduction:  # fmt: skip
    """Creates a Reduction from the arguments of a patch()."""
    one = (merge is None) != (keep_rate is None)
    check(one, name, "merge", "must be given, or keep_rate, and not both", merge)
    check_bool(name, "fuse", fuse)
    if merge is not None:
        check(layers is None, name, "layers", "requires keep_rate: merge takes a list", layers)
        several = merge if isinstance(merge, list | tuple) else [merge] * depth
        counts = [as_int(name, "merge", r) for r in several]
        check(len(counts) == depth, name, "merge", f"must be one, or {depth}", len(counts))
        check(min(counts) >= 0, name, "merge", "must not be negative", min(counts))
        return Reduction(counts, None, prefix, fuse, backend)
    rate = as_number(name, "keep_rate", keep_rate)
    check(0 < rate <= 1, name, "keep_rate", "must be above 0 and at most 1", rate)
    check(class_token, name, "model", "must have a class token for keep_rate", "none")
    chosen = [depth * i // 4 for i in (1, 2, 3)] if layers is None else layers
    check(isinstance(chosen, list | tuple), name, "layers", "must be several", layers)
    at = {as_int(name, "layers", i) for i in chosen}
    inside = all(0 <= i < depth for i in at)
    check(inside, name, "layers", f"must be blocks from 0 to {depth - 1}", chosen)
    rates = [rate if i in at else 1.0 for i in range(depth)]
    return Reduction(None, rates, prefix, fuse, backend)


def install(
    name: str, model: nn.Module, blocks: Sequence[nn.Module], reduction: Reduction,
    forward: Callable[..., Any],
) -> None:  # fmt: skip
    """Replaces the forward of each block by forward(block, number, reduction, ...)."""
    check(KEEP not in vars(model), name, "model", "must not be patched yet", type(model).__name__)
    check_own_forward(name, blocks)
    for number, block in enumerate(blocks):
        block.forward = functools.partial(forward, block, number, reduction)
    vars(model)[KEEP] = (reduction, blocks)


def uninstall(name: str, model: nn.Module) -> None:
    kept = vars(model).pop(KEEP, None)
    check(kept is not None, name, "model", "must be patched", type(model).__name__)
    for block in kept[1]:
        del block.forward


def check_own_forward(name: str, modules: Sequence[nn.Module]) -> None:
    """Checks that no patch, hook or wrapper replaces the forward of their classes."""
    for module in modules:
        free = "forward" not in vars(module)
        rule = "must have blocks with the forward of their class"
        check(free, name, "model", rule, f"{type(module).__name__} with another")
