"""Host side of dense attention: plans, arguments and launches of forward and backward kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokenmill._call.operator import as_record, record_of
from tokenmill._check import check
from tokenmill._kv_cache import capacity
from tokenmill.dense.terms import has_row_statistic

from ..common import (
    INTERPRETED,
    CuSeqlens,
    Rows,
    Terms,
    Window,
    architecture,
    choices_of,
    launch,
    terms_of,
    window_of,
)
from ..tuned import tuned
from .attention_backward import Saved, bias_kernel, keys_kernel, queries_kernel
from .attention_forward import attention_kernel
from .kv_cache import LONG, Store, held, scale_of
from .masks import (
    COUNTS,
    LISTED,
    Lists,
    PairMask,
    key_tiles_kernel,
    mask_of,
    query_tiles_kernel,
    ranges_in,
)


class Tiles(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    forward: Tiles
    queries: Tiles
    keys: Tiles


# Keyed by (element size in bytes, head_dim): the largest tiles that do not spill. float32 above
# head_dim 128 spills at any size, because two halves of 16 queries fill the registers; head_dim 128
# spills 8 bytes on 12.0. Shared memory: 99 KiB, available on every GPU from 8.0 up.
PLANS = {
    (2, 64): Plan(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2)),
    (2, 128): Plan(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    (2, 256): Plan(Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 1)),
    (4, 64): Plan(Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(32, 16, 4, 2)),
    (4, 128): Plan(Tiles(16, 32, 4, 2), Tiles(16, 32, 8, 1), Tiles(32, 16, 8, 1)),
    (4, 256): Plan(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
}
# For 9.0 and 10.x: 227 KiB of shared memory and 64-row MMA per warpgroup.
LARGE_PLANS = PLANS | {
    (2, 64): Plan(Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
    (2, 128): Plan(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2)),
    (2, 256): Plan(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1)),
    (4, 64): Plan(Tiles(64, 32, 8, 3), Tiles(64, 16, 8, 2), Tiles(32, 16, 4, 2)),
}


def plan_of(
    plans: dict[tuple[int, int], Plan],
    q: Tensor,
    value_dim: int,
    more_terms: bool,
    size: int | None = None,
) -> Plan:
    """Tiles for a call. more_terms: the call has a bias, softcap or post-sum decay. size: element
    size in bytes of the widest operand, None = element size of q."""
    size = size or q.element_size()
    wide = min(triton.next_power_of_2(max(64, q.shape[-1], value_dim)), LONG.value)
    plan = plans[size, wide]
    if not more_terms:
        return plan
    # The extra terms take the registers of half a tile.
    return Plan(*(t._replace(block_n=max(t.block_n // 2, 16)) for t in plan))


def tile_options(tiles: Tiles, head_dim: int, value_dim: int) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
        "BLOCK_V": max(triton.next_power_of_2(value_dim), 16),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def choice_options(tiles: Tiles, head_dim: int, value_dim: int, **choices: Any) -> dict[str, Any]:
    """Launch options of kernels that take Choices."""
    options = tile_options(tiles, head_dim, value_dim)
    launched = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    return {"C": choices_of(**choices, **options), **launched}


NO_LISTS = Lists(None, 0, 0, 1)


class Call(record_of("attention")):  # type: ignore[misc]
    """The arguments of a call, and the kernel arguments derived from them."""

    __slots__ = ()

    @property
    def plain(self) -> bool:
        terms = self.bias is not None or self.softcap != 0.0 or self.post_decay
        masks = self.mask_ranges is not None or self.mask_q_spans is not None
        return not (terms or masks) and self.kind in ("softmax", "sigmoid")

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[-2]

    @property
    def longest_q(self) -> int:
        return _bounded(self.q.shape[-3], self.max_seqlen_q)

    @property
    def longest_k(self) -> int:
        return _bounded(self.k.shape[-3], self.max_seqlen_k)

    @property
    def statistics_shape(self) -> Sequence[int]:
        """Shape of lse and delta."""
        lead = () if self.packed else (self.batch,)
        return (*lead, self.heads, self.q.shape[-3])

    def plan(self) -> Plan:
        if INTERPRETED.value:
            # In the interpreter a tile costs milliseconds whatever its size; keep several tiles
            # even for short sequences.
            m, n = (
                min(max(triton.next_power_of_2(length) // 64, 32), 1024)
                for length in (self.longest_q, self.longest_k)
            )
            return Plan(*[Tiles(m, n, 4, 1)] * 3)
        plans = LARGE_PLANS if 90 <= architecture(self.q) < 120 else PLANS
        more_terms = self.bias is not None or self.softcap != 0.0 or self.post_decay
        float8 = self.v.element_size() == 1  # float8 values are multiplied in float32
        size = 4 if float8 else self.q.element_size()
        plan = plan_of(plans, self.q, self.v.shape[-1], more_terms, size)
        if float8:  # decoding float8 takes registers too
            plan = plan._replace(forward=plan.forward._replace(num_warps=8))
        if self.kind in ("softmax", "sigmoid") or size == 4:
            return plan
        # P V of unbounded weights has an accumulator of its own: halve the rows of each program.
        return Plan(
            plan.forward._replace(block_m=plan.forward.block_m // 2),
            plan.queries._replace(block_m=plan.queries.block_m // 2),
            plan.keys._replace(block_n=max(plan.keys.block_n // 2, 16)),
        )

    def new(
        self, shape: Sequence[int], dtype: torch.dtype | None = None, none: float = 0.0
    ) -> Tensor:
        """Allocates an output. Tokens outside all packed sequences, which no program writes, hold
        `none`."""
        dtype = dtype or self.q.dtype
        if self.packed:
            return self.q.new_full(shape, none, dtype=dtype)
        return self.q.new_empty(shape, dtype=dtype)

    def rows(self, t: Tensor) -> Rows:
        return Rows(t, 0 if self.packed else t.stride(0), t.stride(-3), t.stride(-2))

    def terms(self) -> Terms:
        return terms_of(
            self.scale,
            self.softcap,
            self.score_bias_value,
            self.score_bias_neg_log_n,
            self.score_bias,
            self.alibi_slopes,
            self.bias,
            self.kind,
            self.grid_width,
            self.grid_distance,
            self.grid_window,
            self.post_decay,
        )

    def window(self) -> Window:
        return window_of(self.window_left, 0 if self.causal else self.window_right)

    def mask(self) -> PairMask:
        return mask_of(self.mask_ranges, self.mask_q_spans, self.mask_k_spans)

    def cu_seqlens(self) -> CuSeqlens:
        return CuSeqlens(self.cu_seqlens_q, self.cu_seqlens_k)

    def conditions(self) -> Sequence[Any]:
        """Arguments common to all kernels that decide on scores and visibility."""
        return self.terms(), self.window(), self.mask(), self.cu_seqlens()

    def lengths(self) -> Sequence[int]:
        """Lengths except blocks."""
        # Paged keys: the mask has one id for each key of the longest request.
        spans = self.mask_k_spans
        tokens_k = self.k.shape[-3] if spans is None else spans.shape[1]
        longest = self.longest_q, self.longest_k
        group = self.heads // max(self.kv_heads, 1)
        return self.q.shape[-3], tokens_k, *longest, self.heads, group

    def lists(self, tiles: Tiles, of_keys: bool) -> Lists:
        """Lists of unmasked tiles: query tiles for each key block, or key tiles for each query
        block."""
        mask = self.mask()
        if mask.ranges is None and mask.q_spans is None:
            return NO_LISTS
        sides = [
            (self.q.shape[-3], self.longest_q, tiles.block_m, self.heads),
            (self.k.shape[-3], self.longest_k, tiles.block_n, self.kv_heads),
        ]
        (tokens, longest, block, heads), (_, others, other_block, _) = (
            reversed(sides) if of_keys else sides
        )
        group = self.heads // max(self.kv_heads, 1) if mask.ranges_head else 1
        heads = heads if mask.ranges_head else 1
        batches = mask.ranges_batch or mask.q_spans_batch or mask.k_spans_batch
        batch = self.batch if self.packed or batches else min(self.batch, 1)
        blocks = triton.cdiv(longest, block)
        rows = tokens // block + batch if self.packed else batch * blocks
        width = COUNTS.value + triton.cdiv(others, other_block)
        data = self.q.new_empty((rows, heads, width), dtype=torch.int32)
        lists = Lists(data, int(batch > 1), int(heads > 1), heads)
        launch(
            query_tiles_kernel if of_keys else key_tiles_kernel,
            batch * heads * blocks,
            self.q,
            lists,
            self.window(),
            mask,
            self.cu_seqlens(),
            *self.lengths()[:4],
            heads,
            group,
            blocks,
            RANGES=ranges_in(mask.ranges),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            TILES=max(LISTED // other_block, 1),
        )
        return lists

    def options(self, tiles: Tiles, page_size: int = 1) -> dict[str, Any]:
        return choice_options(
            tiles,
            self.q.shape[-1],
            self.v.shape[-1],
            KIND=self.kind,
            NORMALIZE=self.normalize,
            FAST=self.precision == "fast",
            RANGES=ranges_in(self.mask_ranges),
            PAGE_SIZE=page_size,
        )


def _bounded(tokens: int, bound: int | None) -> int:
    return tokens if bound is None else min(tokens, bound)


def attention(a: Any) -> tuple[Tensor, Tensor]:
    check(not a.invariant, "attention", "invariant", "must be False on a GPU", a.invariant)
    return forward(Call(*a))


def store_of(a: Any) -> tuple[Store, tuple[int, int, int]]:
    """Tensors and lengths of the cache of a call of attention_decode."""
    k, v = (Rows(held(t), *t.stride()[:3]) for t in (a.k_cache, a.v_cache))
    store = Store(k, v, a.seqlens_k, a.block_table, scale_of(a.k_scale), scale_of(a.v_scale))
    stride = 0 if a.block_table is None else a.block_table.stride(0)
    return store, (stride, a.k_cache.shape[0], capacity(a.k_cache, a.block_table))


def attention_cached(a: Any) -> tuple[Tensor, Tensor]:
    """Forward over the KV cache of a call of attention_decode."""
    call = Call(*as_record("attention", a, k=a.k_cache, v=a.v_cache))
    return forward(call, *store_of(a))


def forward(
    call: Call, store: Store | None = None, cache_lengths: Sequence[int] = (0, 0, 0)
) -> tuple[Tensor, Tensor]:
    """store and cache_lengths: keys and values in a cache."""
    plain = call.plain and store is None
    tiles = tuned("attention", call.plan().forward, call.q, call.v.shape[-1], plain)
    blocks = triton.cdiv(call.longest_q, tiles.block_m)
    out = call.new((*call.q.shape[:-1], call.v.shape[-1]))
    statistic = has_row_statistic(call.kind, call.normalize)
    none = -torch.inf if call.kind == "softmax" else 0.0
    lse = call.new(call.statistics_shape if statistic else (0,), torch.float32, none)
    launch(
        attention_kernel,
        call.batch * call.heads * blocks,
        call.q,
        call.rows(call.q),
        store or Store(call.rows(call.k), call.rows(call.v)),
        call.rows(out),
        lse,
        call.sink,
        # With a cache, masked pairs are tested one by one: no tile lists.
        call.lists(tiles, of_keys=False) if store is None else NO_LISTS,
        *call.conditions(),
        *cache_lengths,
        *call.lengths(),
        blocks,
        **call.options(tiles, 1 if store is None or store.block_table is None else call.k.shape[1]),
    )
    return out, lse


def attention_backward(a: Any) -> tuple[Tensor, ...]:
    call = Call(*as_record("attention", a))
    out, lse = a.out, a.lse
    plan = call.plan()
    score_bias, bias, slopes, sink = (
        getattr(a, name) if getattr(a, f"needs_d{name}") else None
        for name in ("score_bias", "bias", "alibi_slopes", "sink")
    )
    dq, dk, dv = (call.new(t.shape) for t in (call.q, call.k, call.v))
    delta = None if out is None else call.new(call.statistics_shape, torch.float32)
    dout, *qkv = map(call.rows, (a.dout, call.q, call.k, call.v))
    saved = Saved(dout, lse, delta, *qkv)

    blocks = triton.cdiv(call.longest_q, plan.queries.block_m)
    score_bias_sums, slope_sums = (
        None if t is None else call.new((call.batch, call.heads, blocks), torch.float32)
        for t in (score_bias, slopes)
    )
    launch(
        queries_kernel,
        call.batch * call.heads * blocks,
        call.q,
        saved,
        a.dlse,
        None if out is None else call.rows(out),
        call.rows(dq),
        call.sink,
        score_bias_sums,
        slope_sums,
        call.lists(plan.queries, of_keys=False),
        *call.conditions(),
        *call.lengths(),
        blocks,
        **call.options(plan.queries),
    )
    blocks = triton.cdiv(call.longest_k, plan.keys.block_n)
    launch(
        keys_kernel,
        call.batch * call.kv_heads * blocks,
        call.q,
        saved,
        call.rows(dk),
        call.rows(dv),
        call.lists(plan.keys, of_keys=True),
        *call.conditions(),
        *call.lengths(),
        blocks,
        **call.options(plan.keys),
    )
    return (
        dq,
        dk,
        dv,
        _sum_blocks(call, score_bias_sums),
        _bias_gradient(call, plan.queries, saved, bias),
        _sum_blocks(call, slope_sums),
        _sink_gradient(call, lse, delta, sink),
    )


def _none(call: Call) -> Tensor:
    """Placeholder gradient for an input that needs none."""
    return call.q.new_empty(0, dtype=torch.float32)


def _bias_gradient(call: Call, tiles: Tiles, saved: Saved, bias: Tensor | None) -> Tensor:
    if bias is None:
        return _none(call)
    dbias = call.q.new_empty(bias.shape, dtype=torch.float32)
    batch, heads, rows, columns = bias.shape
    launch(
        bias_kernel,
        batch * heads * triton.cdiv(rows, tiles.block_m) * triton.cdiv(columns, tiles.block_n),
        call.q,
        saved,
        dbias,
        heads,
        rows,
        columns,
        call.batch if batch == 1 else 1,
        call.heads if heads == 1 else 1,
        *call.conditions(),
        *call.lengths(),
        SUM_Q=rows == 1,
        SUM_K=columns == 1,
        **call.options(tiles),
    )
    return dbias


def _sum_blocks(call: Call, sums: Tensor | None) -> Tensor:
    """Sums block partials [B, H, blocks] to [B, H]."""
    return _none(call) if sums is None else sums.sum(2)


def sink_terms(lse: Tensor, delta: Tensor, sink: Tensor) -> Tensor:
    """-P_sink delta of each row, [B, H, Sq] or [H, Tq]: the sink logit has no value."""
    # P_sink = exp(sink - lse)
    logits = sink[:, None]
    p = torch.where(lse == logits, 1.0, torch.exp(logits - lse))  # also if both are inf
    p = torch.where(lse == float("-inf"), 0.0, p)
    return -(p * delta)


def _sink_gradient(
    call: Call, lse: Tensor | None, delta: Tensor | None, sink: Tensor | None
) -> Tensor:
    """Gradient of the sink, [B, H]."""
    if lse is None or delta is None or sink is None:
        return _none(call)
    sums = sink_terms(lse, delta, sink)
    if not call.packed:
        return sums.sum(2)
    dsink = call.q.new_zeros((call.batch, call.heads), dtype=torch.float32)
    dsink[:1] = sums.sum(1)  # sum over all sequences
    return dsink
