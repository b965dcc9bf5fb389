"""Programs in the style of the CUDA samples (samples.cu), from one build."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from test_abi import NVCC, PTX, Abi, compile_abi

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Abi]:
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        folder = tmp_path_factory.mktemp("samples")
        flags = [PTX, "--compress-mode=none", "-diag-suppress=20054"]
        yield Abi(executor, compile_abi(folder, flags, "samples.cu"), "samples")


@pytest.mark.parametrize("device", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("order", ["forward", "seeded"])
def test_barriers_and_pipelines(samples: Abi, order: str, device: str) -> None:
    x = np.random.default_rng(0).integers(-9, 9, 5 * 64).astype(np.float32)
    tiles, out = x.reshape(5, 64), np.zeros(64, np.float32)
    with samples.options(check=1, order=order, device=device):
        assert samples.call("run_producer_consumer", x, out, 5) == 0, samples.text(719)
        assert np.array_equal(out, tiles.sum(0))
        assert samples.call("run_pipelined", x, out, 5) == 0, samples.text(719)
    assert np.array_equal(out, np.roll(tiles, -1, 1).sum(0) + tiles[0])
    samples.release()


def test_grid_sync(samples: Abi) -> None:
    n, blocks = 10000, 40
    x = np.random.default_rng(1).integers(-9, 9, n).astype(np.float32)
    partial, out = np.zeros(blocks * 4, np.float32), np.zeros(1, np.float32)
    for order in ("forward", "reverse", "seeded"):
        with samples.options(order=order):
            assert samples.call("run_grid_sum", x, partial, out, n, blocks) == 0
        assert out[0] == x.sum()
    assert samples.call("run_grid_sum", x, partial, out, n, 132 * 16 + 1) == 720
    assert samples.call("run_grid_sum_alone", x, partial, out, n) == 719  # not cooperative
    samples.recover()
    samples.release()


@pytest.mark.parametrize("check", [0, 1])
def test_wmma_gemm(samples: Abi, check: int) -> None:
    random = np.random.default_rng(2)
    a, b = random.integers(-4, 5, (32, 48)), random.integers(-4, 5, (16, 48))
    c = random.integers(-4, 5, (32, 16)).astype(np.float32)
    wanted = 2 * a @ b.T + c
    halves = [x.astype(np.float16) for x in (a, b)]
    with samples.options(check=check):
        assert samples.call("run_wmma_gemm", *halves, c, 32, 16, 48) == 0, samples.text(719)
    assert np.array_equal(c, wanted)
    samples.release()


def test_graphs(samples: Abi) -> None:
    x, y = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    assert samples.call("run_graph", x, y, 100) == 0
    assert np.array_equal(x, np.arange(100) * 216)
    assert np.array_equal(y, np.arange(100) * 72)
    codes = np.zeros(12, np.int32)
    assert samples.call("run_bad_captures", x, codes) == 11
    # unsupported, illegal state; unsupported, implicit; each then invalid; unjoined
    assert codes[:11].tolist() == [900, 401, 900, 901, 900, 901, 906, 901, 0, 904, 0]
    assert np.array_equal(x, np.arange(100) * 216)
    samples.release()


CAPTURES = {
    "work after its join": (0, 904),
    "event of no capture": (905, 901),
    "end by another thread": (908, 0),
    "call of a thread of mode thread-local": (0, 0),
    "two captures": (902, 901, 901),
    "record in the legacy stream": (906, 901),
    "wait for the legacy stream": (906, 901),
    "status of the legacy stream": (906, 0),
    "work of the legacy stream beside a blocking member": (906, 901),
    "query of an event": (900, 901),
    "record in an invalid capture": (901, 901),
    "wait for an invalid capture": (901, 901),
    "memory": (801, 0),
    "threads": (9, 0),
    "shared memory": (1, 0),
    "stream of the thread": (0, 0),
    "time of captured events": (907,),
    "update to another number of nodes": (910,),
    "graph of the caller": (901, 0),
    "destroyed member": (0, 901),
    "destroyed origin": (0, 0),
}


def test_captures(samples: Abi) -> None:
    x, codes = np.ones(4, np.float32), np.full(64, -1, np.int32)
    count = samples.call("run_more_captures", x, codes)
    got = iter(codes[:count].tolist())
    assert {name: tuple(next(got) for _ in c) for name, c in CAPTURES.items()} == CAPTURES
    assert list(got) == []
    samples.release()


def test_host_functions_run_without_the_lock(samples: Abi) -> None:
    assert samples.call("run_host_function") == 0


def test_cooperative_launches_keep_to_the_rules_of_launches(samples: Abi) -> None:
    for threads, kilobytes, error in ((2048, 0, 9), (64, 200, 1), (64, 4194303, 1)):
        assert samples.call("run_cooperative", threads, kilobytes) == error


def test_calls_through_pointers_are_faults_of_their_kernel(samples: Abi) -> None:
    out = np.full(1, 3, np.float32)
    for which in range(3):
        assert samples.call("run_indirect", out, which) == 719
        assert "calls through pointers are not supported" in samples.text(719)
        samples.recover()
    samples.release()


def test_memory_pools(samples: Abi) -> None:
    out, results = np.zeros(1, np.float32), np.full(32, -9, np.int32)
    count = samples.call("run_pool", out, results)
    assert results[:count].tolist() == [
        *(0, 0, 0, 0, -1),  # pools; the threshold
        *(0, 2, 0, 600, 600),  # allocations
        *(0, 0, 1, 0, 1),  # the destroyed pool, and the default one
        *(600, 0, 801, 0, 3),  # high-water mark; shared handles; access
    ]
    assert out[0] == 6
    samples.release()


def test_a_call_that_is_missing_names_itself(samples: Abi) -> None:
    assert samples.call("run_missing") == 801
    assert samples.text(801).endswith("cudaMalloc3D: the machine does not have this call")


def test_simd_in_a_word(samples: Abi) -> None:
    a, b, out = (np.array([v], np.uint32) for v in (0x80FF0102, 0x7F017F80, 0))
    out = np.zeros(8, np.uint32)
    assert samples.call("run_differences", a, b, out) == 0, samples.text(719)
    x, y = (v.view(np.uint8).astype(np.int64) for v in (a, b))
    s, t = (v.view(np.int16).astype(np.int64) for v in (a, b))
    wanted = [
        np.abs(x - y).astype(np.uint8),
        np.array([np.abs(x - y).sum()], np.uint32),
        np.abs(s - t).astype(np.uint16),
        (x + y).astype(np.uint8),
        np.maximum(a.view(np.uint16), b.view(np.uint16)),
        ((x + y + 1) // 2).astype(np.uint8),
        np.minimum(np.abs(s), 32767).astype(np.uint16),
        np.abs(x.astype(np.int8).astype(int) - y.astype(np.int8)).astype(np.uint8),
    ]
    assert out.tolist() == [int(w.view(np.uint32)[0]) for w in wanted]
    samples.release()
