"""LeanAttention: the tiles of all heads and requests are cut into ranges of equal length, and
partial results are rescaled to a common maximum and added."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import backends, device_of
from tensors import close, draw, each_backend

import tokenmill as tm

LENGTHS, H, D, TILE, WORKERS = (70, 9, 121), 3, 16, 8, 5


def streamed(q, k, v):
    """Results [B, H, D] of the last queries, as section 4 computes them."""
    tiles = [
        (b, h, first)
        for b, n in enumerate(LENGTHS)
        for h in range(H)
        for first in range(0, n, TILE)
    ]
    share = math.ceil(len(tiles) / WORKERS)
    partial: dict[tuple[int, int], list] = {}
    for worker in range(WORKERS):
        running = {}  # output -> maximum, sum, numerator
        for b, h, first in tiles[worker * share : (worker + 1) * share]:
            rows = slice(first, min(first + TILE, LENGTHS[b]))
            z = k[b, rows, h] @ q[b, h] * D**-0.5
            m, total, o = running.get((b, h), (-math.inf, 0.0, torch.zeros(D, dtype=q.dtype)))
            top = max(m, float(z.max()))
            p, shrink = torch.exp(z - top), math.exp(m - top)
            running[b, h] = (top, shrink * total + float(p.sum()), shrink * o + p @ v[b, rows, h])
        for output, state in running.items():
            partial.setdefault(output, []).append(state)
    out = torch.empty_like(q)
    for (b, h), states in partial.items():
        top = max(m for m, _, _ in states)
        total = sum(math.exp(m - top) * s for m, s, _ in states)
        out[b, h] = sum(math.exp(m - top) * o for m, _, o in states) / total
    return out


@pytest.mark.parametrize("schedule", ["stream_k", "auto"])
@each_backend
def test_ranges_of_equal_length(schedule, backend):
    shape = (len(LENGTHS), max(LENGTHS), H, D)
    q, k, v = (t.detach() for t in draw(backend, (len(LENGTHS), 1, H, D), shape, shape))
    want = streamed(*(t.cpu().double() for t in (q[:, 0], k, v)))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device_of(backend))
    got = tm.attention_decode(q, k, v, seqlens_k=lengths, schedule=schedule, backend=backend)
    close(got[:, 0].cpu(), want)


@each_backend
def test_softmax_rescaling_is_associative(backend):
    outs, lses = (t.detach() for t in draw(backend, (3, 1, 2, H, D), (3, 1, H, 2)))
    whole, total = tm.merge_attention_states(outs, lses, backend=backend)
    first, lse = tm.merge_attention_states(outs[:2], lses[:2], backend=backend)
    both = torch.stack([first, outs[2]]), torch.stack([lse, lses[2]])
    out, again = tm.merge_attention_states(*both, backend=backend)
    close(out, whole)
    close(again, total)


# Work partition of a launch. float32 values reveal it: the weights are 1, and -2^30, 2^30 and 1 are
# at the first keys of tile 0, tile c and tile c + 1. A range that adds 1 to 2^30 loses it; a range
# that begins with tile c + 1 keeps it, because -2^30 and 2^30 cancel when ranges are merged.
RAGGED, KV_HEADS, SPLITS, GIANT = (700, 90, 1210), 2, 5, 2.0**30


def tile_keys(backend):
    """Keys per step for float32 and head_dim 64; Triton's interpreter uses a sixteenth of the next
    power of two."""
    return 128 if backend == "triton" and device_of(backend) == "cpu" else 64


def steps_of(backend):
    return [-(-n // tile_keys(backend)) for n in RAGGED for _ in range(KV_HEADS)]


def cut_equally(backend):
    """Ranges of equal length over the concatenated steps of all requests and heads, each of at
    least 256 keys."""
    total, minimum = sum(steps_of(backend)), 256 // tile_keys(backend)
    if backend == "triton":
        programs = 2 * 8
        if device_of(backend) == "cuda":
            programs = 2 * torch.cuda.get_device_properties(0).multi_processor_count
        share = max(-(-total // programs), minimum)
        return [(a, min(a + share, total)) for a in range(0, total, share)]
    blocks = -(-total // minimum)  # fewer CTAs than the device runs at once
    return [(i * total // blocks, (i + 1) * total // blocks) for i in range(blocks)]


def cut_by_request(backend):
    """Each request and head is cut into the same number of ranges."""
    ranges, before = [], 0
    for steps in steps_of(backend):
        parts = min(SPLITS, steps)
        ranges += [(before + i * steps // parts, before + (i + 1) * steps // parts)
                   for i in range(parts)]  # fmt: skip
        before += steps
    return ranges


def kept(ranges, backend):
    """For each request, head and tile c, True if the 1 of tile c + 1 is in the result."""
    owner = [i for i, (a, b) in enumerate(ranges) for _ in range(a, b)]
    rows, before = [], 0
    for steps in steps_of(backend):
        own = owner[before : before + steps]
        rows.append([own[c] != own[c + 1] or own[c] == own[0] for c in range(steps - 1)])
        before += steps
    return rows


def seen(schedule, backend, **options):
    tile, device = tile_keys(backend), device_of(backend)
    longest, batch, channels = max(RAGGED), len(RAGGED), 64
    v = torch.zeros(batch, longest, KV_HEADS, channels)
    tiles = -(-longest // tile)
    for c in range(tiles - 1):
        v[:, 0, :, c] -= GIANT
        v[:, c * tile, :, c] += GIANT
        v[:, (c + 1) * tile, :, c] = 1
    q, k = torch.zeros(batch, 1, KV_HEADS, channels), torch.randn_like(v)
    out = tm.attention_decode(
        *(t.to(device) for t in (q, k, v)),
        seqlens_k=torch.tensor(RAGGED, dtype=torch.int32, device=device),
        schedule=schedule, backend=backend, **options,
    )  # fmt: skip
    sums = out[:, 0].cpu() * torch.tensor(RAGGED)[:, None, None]
    rows = sums.flatten(0, 1).tolist()
    return [
        [bool(x > 0.5) for x in row[: steps - 1]]
        for row, steps in zip(rows, steps_of(backend), strict=True)
    ]


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_the_work_of_a_launch_is_cut_into_equal_ranges(backend):
    """stream_k: the same number of steps in each range, for any request lengths; split: each
    request separately."""
    ranges = cut_equally(backend)
    lengths = [b - a for a, b in ranges]
    assert max(lengths) - min(lengths[:-1]) <= 1 and sum(lengths) == sum(steps_of(backend))
    equal, apart = kept(ranges, backend), kept(cut_by_request(backend), backend)
    assert equal != apart
    assert seen("stream_k", backend) == equal
    assert seen("split", backend, num_splits=SPLITS) == apart
    if backend != "triton":  # its split follows its own rule
        assert seen("auto", backend) == equal
