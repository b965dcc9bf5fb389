"""Objects compiled by nvcc, launched through the stand-in for the CUDA runtime."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import abi_process
import numpy as np
import pytest
import toolchain

NVCC = toolchain.nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

PTX = "-gencode=arch=compute_80,code=compute_80"
VARIANTS = {
    "plain": [PTX, "--compress-mode=none"],
    "compressed": [PTX],
    "beside machine code": ["-gencode=arch=compute_80,code=[sm_80,compute_80]"],
    "stream per thread": [PTX, "--compress-mode=none", "--default-stream=per-thread"],
}


class Abi:
    """One build of abi.cu. Arrays are registered as global memory until they are released."""

    def __init__(self, process: ProcessPoolExecutor, path: Path, name: str) -> None:
        self.name = name
        self.process = process
        self.path = str(path)
        self.arrays: list[np.ndarray] = []

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.process.submit(function, *arguments).result()

    def call(self, function: str, *arguments: np.ndarray | int) -> int:
        arrays = [x for x in arguments if not isinstance(x, int)]
        self.arrays += arrays  # keeps the arrays alive, so that keys stay unique
        given = [x if isinstance(x, int) else (id(x), x) for x in arguments]
        result, after = self._ask(abi_process.call, self.path, function, given)
        for array, contents in zip(arrays, after, strict=True):
            array[:] = contents
        return int(result)

    def release(self) -> None:
        self._ask(abi_process.release)
        self.arrays.clear()

    def text(self, error: int) -> str:
        return str(self._ask(abi_process.text, self.path, error))

    def recover(self) -> None:
        self._ask(abi_process.recover)

    @contextlib.contextmanager
    def options(self, **options: int | str) -> Iterator[None]:
        self._ask(abi_process.set_options, options)
        try:
            yield
        finally:
            self._ask(abi_process.set_options, {})


def compile_abi(folder: Path, flags: list[str], name: str = "abi.cu") -> Path:
    library = folder / "library.so"
    source = Path(__file__).with_name(name)
    command = [str(NVCC), "-std=c++17", "-cudart=shared", "-shared", "-Xcompiler=-fPIC", *flags]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module", params=list(VARIANTS))
def build(
    request: pytest.FixtureRequest,
    process: ProcessPoolExecutor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Abi:
    folder = tmp_path_factory.mktemp("abi")
    return Abi(process, compile_abi(folder, VARIANTS[request.param]), request.param)


@pytest.fixture
def abi(build: Abi) -> Iterator[Abi]:
    yield build
    build.release()


@pytest.fixture
def built(process: ProcessPoolExecutor, tmp_path: Path) -> Iterator[Callable[..., Abi]]:
    """Compiles an additional library for one test."""
    libraries = []

    def build(flags: list[str], name: str = "abi.cu") -> Abi:
        libraries.append(Abi(process, compile_abi(tmp_path, flags, name), name))
        return libraries[-1]

    yield build
    for library in libraries:
        library.release()


def vectors(n: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    a, b = (random.random(n, dtype=np.float32) for _ in range(2))
    return a, b, np.full(n, np.nan, np.float32)


def test_ways_to_launch(abi: Abi) -> None:
    a, b, out = vectors()
    for function, *rest in (("launch_add", 256), ("launch_add_by_pointer",)):
        out[:] = np.nan
        assert abi.call(function, a, b, out, len(a), *rest) == 0
        assert np.array_equal(out, a + b)
    out[:] = np.nan
    assert abi.call("launch_add_extended", a, b, out, len(a), 1) == 0
    assert np.array_equal(out, a + b)
    assert abi.call("launch_add_extended", a, b, out, len(a), 2) == 801
    assert "clusters of more than one block" in abi.text(801)
    assert abi.call("last_error") == 801
    assert abi.call("last_error") == 0


def test_structures_and_variables(abi: Abi) -> None:
    a, b, out = vectors()
    count = np.zeros(1, np.uint32)
    expected = a * np.float32(-3) + b * (np.arange(1000, dtype=np.float32) % 4 + 1) + 0.5
    for launches in (1, 2):
        assert abi.call("launch_scaled", a, b, out, len(a), count) == 0
        assert np.allclose(out, expected, atol=1e-6)
        assert count[0] == 7 + 1000 * launches


def test_cooperative_launch(abi: Abi) -> None:
    arrived, out = np.zeros(1, np.uint32), np.zeros(200 * 64, np.uint32)
    assert abi.call("launch_meet", arrived, out, 200) == 0
    assert (out == 200).all()
    blocks = 32 * int(os.environ.get("PTXVM_SMS", "132"))
    assert abi.call("launch_meet", arrived, out, blocks + 1) == 720
    assert f"at most {blocks} blocks here; got {blocks + 1}" in abi.text(720)
    assert abi.call("last_error") == 720


def test_device_memory_streams_and_events(abi: Abi) -> None:
    x, _, out = vectors()
    assert abi.call("launch_sum", x, out, len(x), 256, 4096, 0) == 0
    assert out[0] == pytest.approx(x.astype(np.float64).sum(), rel=1e-5)


def test_errors_are_those_of_cuda(abi: Abi) -> None:
    x, b, out = vectors()
    assert abi.call("launch_sum", x, out, len(x), 288, 4096, 0) == 1
    assert "bound to 256 threads per block; got 288" in abi.text(1)
    assert abi.call("launch_add", x, b, out, len(x), 1025) == 9
    assert "block (1025, 1, 1) must be from 1 to" in abi.text(9)
    assert abi.call("launch_sum", x, out, len(x), 256, 60000, 0) == 1
    assert "at most 49152 bytes without cudaFuncAttribute" in abi.text(1)
    assert abi.call("launch_sum", x, out, len(x), 256, 60000, 1) == 0
    assert abi.call("launch_sum", x, out, len(x), 256, 163 * 1024 + 1, 1) == 1
    assert "cudaFuncSetAttribute: dynamic shared memory is at most 166912" in abi.text(1)
    short = np.zeros(10, np.float32)
    assert abi.call("launch_add", x, short, out, len(x), 256) == 719
    assert (
        "unspecified launch failure: add(float const*, float const*, float*, int), line"
        in abi.text(719)
    )
    assert "ld.global" in abi.text(719)
    assert abi.call("texts_stay", 719) == 1
    assert abi.call("launch_add", x, b, out, len(x), 256) == 719
    abi.recover()
    assert abi.call("launch_add", x, b, out, len(x), 256) == 0
    assert abi.text(2) == "out of memory"


def test_a_fault_is_what_every_later_call_returns(abi: Abi) -> None:
    codes = np.zeros(20, np.int32)
    n = abi.call("after_a_fault", codes)
    abi.recover()
    assert n == 13 and (codes[:n] == 719).all()
    assert abi.call("last_error") == 0


def test_copies_stay_within_an_allocation(abi: Abi) -> None:
    codes = np.zeros(20, np.int32)
    n = abi.call("out_of_range", codes)
    assert n == 10 and (codes[:n] == 1).all()
    assert abi.call("other_calls") == 0


@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors", "shared", "threads", "blocks"),
    [
        ("sm_80", 80, 132, 166912, 2048, 6),
        ("sm_86", 86, 84, 101376, 1536, 4),
        ("sm_89", 89, 128, 101376, 1536, 4),
        ("sm_90a", 90, 132, 232448, 2048, 8),
        ("sm_120", 120, 170, 101376, 1536, 4),
    ],
)
def test_devices(
    name: str,
    capability: int,
    multiprocessors: int,
    shared: int,
    threads: int,
    blocks: int,
    abi: Abi,
) -> None:
    x, _, out = vectors()
    values = np.zeros(9, np.int32)
    with abi.options(device=name):
        assert abi.call("limits", values) == 0
        assert values.tolist() == [
            *divmod(capability, 10),
            int(os.environ.get("PTXVM_SMS", multiprocessors)),
            shared,
            shared + 1024,
            threads,
            capability,
            shared,
            blocks,
        ]
        assert abi.call("launch_sum", x, out, len(x), 256, shared, 1) == 0
        assert abi.call("launch_sum", x, out, len(x), 256, shared + 1, 1) == 1
        assert f"at most {shared} bytes on {name}; got {shared + 1}" in abi.text(1)
        assert abi.call("last_error") == 1
    if shared > 101376:  # attributes set for one device do not apply to another
        with abi.options(device="sm_86"):
            assert abi.call("launch_sum", x, out, len(x), 256, shared, 0) == 1


def test_what_the_device_says(abi: Abi) -> None:
    values = np.zeros(6, np.int32)
    assert abi.call("query", values) == 0
    threads, registers, capability, multiprocessors, shared, blocks = values.tolist()
    assert (threads, capability, shared) == (256, 80, 163 * 1024)
    assert multiprocessors == int(os.environ.get("PTXVM_SMS", "132"))
    assert blocks == 4
    assert (registers > 0) == (abi.name == "beside machine code")


def test_module_for_another_architecture(built: Callable[..., Abi]) -> None:
    abi = built(["-gencode=arch=compute_90a,code=compute_90a", "--compress-mode=none"])
    a, b, out = vectors()
    assert abi.call("launch_add", a, b, out, len(a), 256) == 200
    assert "no PTX for compute_80 or below, only for compute_90" in abi.text(200)
    with abi.options(device="sm_90a"):
        assert abi.call("launch_add", a, b, out, len(a), 256) == 0
    assert np.array_equal(out, a + b)


def test_module_that_cannot_be_read(built: Callable[..., Abi]) -> None:
    """Compressed with LZ4 by --compress-mode=speed, which the machine cannot read."""
    abi = built([PTX, "--compress-mode=speed"])
    a, b, out = vectors()
    assert abi.call("launch_add", a, b, out, len(a), 256) == 200
    assert "LZ4; build it with nvcc --compress-mode=none" in abi.text(200)


@pytest.mark.parametrize("flag", ["-O3", "-G", "-lineinfo"])
def test_code_of_the_compiler(flag: str, built: Callable[..., Abi]) -> None:
    abi = built([PTX, flag], "language.cu")
    out, expected = (np.full(1100, np.nan, np.float32) for _ in range(2))
    with abi.options(check=1):
        assert abi.call("on_device", out, 900) == 0
        abi.call("on_host", expected, 900)
        assert np.array_equal(out[:900], expected[:900])
        assert abi.call("on_device", out, 1100) == 710
    text = abi.text(710)
    abi.recover()
    assert text.startswith("device-side assert triggered: kernel(float*, int)")
    assert "assertion 'i < 1000' failed at" in text
    named = re.search(r"kernel\(float\*, int\), line \d+ \((\S+):(\d+)\): call", text)
    assert (named is None) == (flag == "-O3")
    if named:
        source = Path(__file__).with_name("language.cu")
        assert source.match(named[1])
        line = source.read_text().splitlines()[int(named[2]) - 1]
        assert flag == "-G" or "assert(" in line
