"""Stream-K schedule of attention_decode: CTAs share all steps equally, whatever the lengths, and
segments tile the keys of each request."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import toolchain
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenmill as tm
from tokenmill import _emulator
from tokenmill.dense.attention_decode_cases import decode_call

ptxvm = pytest.importorskip("ptxvm", reason="the package ptxvm is not installed")
HERE = Path(__file__).parent
NVCC, CUTLASS = toolchain.nvcc(), toolchain.cutlass_include()
pytestmark = pytest.mark.skipif(
    NVCC is None or CUTLASS is None, reason="needs nvcc and the CUTLASS headers"
)
THREADS, TILE_KEYS, MIN_STEPS, FIELDS = 128, 64, 4, 6  # the Shape of stream_k.cu
RAGGED = (300, 1, 9000, 2500, 0, 64, 5000, 1200)


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    ptx = tmp_path_factory.mktemp("stream_k") / "stream_k.ptx"
    flags = ["-ptx", "-std=c++20", "-arch=compute_80", f"-I{HERE.parents[1] / 'csrc'}"]
    command = [NVCC, *flags, f"-I{CUTLASS}", HERE / "stream_k.cu", "-o", ptx]
    subprocess.run(command, check=True, capture_output=True)
    return ptxvm.machine().load(ptx.read_text())


def schedule(kernel, grid, lengths, heads, kv_heads, tokens, window, tile_rows):
    """Segments of each CTA: (output tile, begin, end, part, parts, first block)."""
    outputs = len(lengths) * kv_heads * -(-heads // kv_heads * tokens // tile_rows)
    number = np.full(grid, -1, np.int32)
    out = np.full((grid, outputs, FIELDS), -1, np.int32)
    scalars = map(np.int32, (len(lengths), heads, kv_heads, tokens, window, tile_rows, outputs))
    with ptxvm.machine().options(check=1):
        kernel.launch(
            "segments", np.array(lengths, np.int32), *scalars, number, out, grid=grid, block=THREADS
        )
    assert number.min() >= 0 and number.max() <= outputs
    return [[tuple(s) for s in out[i, :n].tolist()] for i, n in enumerate(number)]


def check_schedule(blocks, lengths, heads, kv_heads, tokens, window, tile_rows):
    steps = [sum(max(1, -(-(s[2] - s[1]) // TILE_KEYS)) for s in segments) for segments in blocks]
    busy = [n for n in steps if n > 0]
    assert steps[: len(busy)] == busy and max(busy) - min(busy) <= 1
    assert len(busy) == min(len(blocks), -(-sum(busy) // MIN_STEPS))

    found: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for block, segments in enumerate(blocks):
        for s in segments:
            found.setdefault(s[0], []).append((block, s))
    tiles = kv_heads * -(-heads // kv_heads * tokens // tile_rows)
    assert sorted(found) == list(range(len(lengths) * tiles))
    for output, parts in found.items():
        length = lengths[output // tiles]
        key = 0 if window < 0 else max(0, length - tokens - window)
        key = min(key, length)
        for part, (block, (_, begin, end, own, count, first_block)) in enumerate(parts):
            assert (begin, own, count, first_block + own) == (key, part, len(parts), block)
            key = end
        assert key == length


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20000), min_size=1, max_size=40),
    heads=st.sampled_from([(1, 1), (8, 2), (32, 8), (48, 1)]),
    tokens=st.integers(1, 5),
    window=st.sampled_from([-1, 0, 100, 5000]),
    grid=st.sampled_from([1, 2, 7, 132, 264]),
)
def test_blocks_take_equal_shares_of_any_lengths(kernel, lengths, heads, tokens, window, grid):
    call = (lengths, *heads, tokens, window, 16 if heads[0] < 32 else 64)
    check_schedule(schedule(kernel, grid, *call), *call)


@pytest.mark.skipif(not tm._call.library.emulated_built(), reason="needs a development build")
@pytest.mark.parametrize("page_size", [None, 16])
def test_the_launch_of_the_operator_is_shared_equally(kernel, page_size):
    """The grid that the operator launches, for lengths from 0 to 9000."""
    heads, kv_heads, dim = 8, 2, 128
    make = decode_call(RAGGED, 1, heads, kv_heads, dim, dim, page_size, 9008, schedule="stream_k")
    args, kwargs = make(torch.float16, torch.Generator().manual_seed(0))
    with _emulator.counting() as launches:
        tm.attention_decode(*args, **kwargs, backend="emulated")
    (launch,) = launches
    assert launch["block"] == [THREADS, 1, 1]
    call = (RAGGED, heads, kv_heads, 1, -1, 16)
    blocks = schedule(kernel, launch["grid"][0], *call)
    check_schedule(blocks, *call)
    assert sum(map(bool, blocks)) > 100  # a single request would occupy only a few
