"""Work partition of decode: how the keys of a cache are distributed over programs.

An output tile is a block of rows of one KV head of a request. "split": each tile's keys are cut
into the same number of ranges. "stream_k": the steps of all output tiles, concatenated, are cut
into shares of equal length, one per program, whose ends may lie anywhere in a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Sequence, Window, launch, lower_bound
from .kv_cache import length_of

SIZES = ["batch", "kv_heads", "heads", "group", "seqlen_q", "rows", "row_blocks", "splits"]
SIZES += ["table_stride", "pages", "capacity", "maximum"]
SIZES += ["tiles", "programs", "minimum", "halvings", "mask_keys", "list_width"]
MIN_RANGE, MAX_RANGES = 256, 64  # min keys of an automatic range; max ranges per request
REQUESTS = tl.constexpr(1024)  # requests per step of the prefix sum


class Stream(NamedTuple):
    """Stream-K parameters. counts None: stream-K is off."""

    counts: Tensor | None  # [B]: inclusive prefix sum of steps per output tile of each request
    batch: int
    tiles: int  # output tiles of a request
    programs: int
    minimum: int  # minimum steps per program


NO_STREAM = Stream(None, 0, 0, 0, 0)


@triton.jit
def decode_program(i, splits, row_blocks, heads):
    """Key range, row block, head and request of program i."""
    i_split = i % splits
    i_block = i // splits % row_blocks
    i_h = i // splits // row_blocks % heads
    return i_split, i_block, i_h, (i // splits // row_blocks // heads).to(tl.int64)


@triton.jit
def range_of(begin, end, splits, i_split, BLOCK: tl.constexpr):
    """Bounds of range i_split of keys begin .. end - 1: whole tiles, with range sizes that differ
    by at most one tile."""
    steps = tl.cdiv(end - begin, BLOCK)
    parts = tl.maximum(tl.minimum(splits, steps), 1)
    first = begin + tl.minimum(i_split, parts) * steps // parts * BLOCK
    last = begin + tl.minimum(i_split + 1, parts) * steps // parts * BLOCK
    return first, tl.minimum(last, end)


@triton.jit
def visible_begin(sequence, left):
    """First key that any query sees."""
    begin = sequence.k_length - sequence.k_length
    if left is not None:
        begin = tl.maximum(sequence.diagonal - left, 0)
    return tl.minimum(begin, sequence.k_length)


@triton.jit(do_not_specialize=SIZES)
def steps_kernel(
    counts, seqlens, capacity, window, batch, seqlen_q, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Prefix sum of steps per tile. At least one step per tile, which stores the result for no
    keys."""
    before = tl.zeros([], tl.int32)
    for b in range(0, batch, BLOCK_B):
        o_b = b + tl.arange(0, BLOCK_B)
        m_b = o_b < batch
        length = length_of(seqlens, capacity, tl.minimum(o_b, batch - 1))
        sequence = Sequence(0, seqlen_q, 0, length, length - seqlen_q)
        b_steps = tl.maximum(tl.cdiv(length - visible_begin(sequence, window.left), BLOCK_N), 1)
        b_steps = tl.where(m_b, b_steps, 0)
        tl.store(counts + o_b, before + tl.cumsum(b_steps, 0), mask=m_b)
        before += tl.sum(b_steps, 0)


@triton.jit
def all_steps(stream):
    return tl.load(stream.counts + stream.batch - 1) * stream.tiles


@triton.jit
def share_of(stream):
    """Steps per program."""
    return tl.maximum(tl.cdiv(all_steps(stream), stream.programs), stream.minimum)


@triton.jit
def steps_of(stream, o_output):
    """First step and number of steps of output tiles."""
    o_b = o_output // stream.tiles
    before = tl.load(stream.counts + o_b - 1, mask=o_b > 0, other=0)
    count = tl.load(stream.counts + o_b) - before
    return before * stream.tiles + o_output % stream.tiles * count, count


@triton.jit
def output_of(stream, step, halvings):
    """Output tile that contains a step."""
    i_b = lower_bound(stream.counts, step - step, stream.batch, step // stream.tiles + 1, halvings)
    first, count = steps_of(stream, i_b * stream.tiles)
    return i_b * stream.tiles + (step - first) // count


def multiprocessors(t: Tensor) -> int:
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 8


def splits_of(q: Tensor, num_splits: int, programs: int, longest: int) -> int:
    """Key ranges per row; programs is the number of programs per range."""
    if num_splits > 0:
        return num_splits
    filling = triton.cdiv(2 * multiprocessors(q), programs)
    return max(min(filling, triton.cdiv(longest, MIN_RANGE), MAX_RANGES), 1)


def stream_of(
    q: Tensor, seqlens: Tensor, capacity: int, window: Window, tiles: int, block_n: int
) -> Stream:
    batch = q.shape[0]
    counts = seqlens.new_empty(batch)
    launch(
        steps_kernel,
        1,
        q,
        counts,
        seqlens,
        capacity,
        window,
        batch,
        q.shape[1],
        BLOCK_N=block_n,
        BLOCK_B=REQUESTS.value,
    )
    maximum = batch * tiles * max(triton.cdiv(capacity, block_n), 1)
    programs = min(2 * multiprocessors(q), maximum)
    return Stream(counts, batch, tiles, programs, max(MIN_RANGE // block_n, 1))


def longest_share(stream: Stream, capacity: int, block_n: int) -> int:
    """Maximum steps per program."""
    maximum = stream.batch * stream.tiles * max(triton.cdiv(capacity, block_n), 1)
    return max(triton.cdiv(maximum, stream.programs), stream.minimum)
