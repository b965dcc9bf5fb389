"""Kernels of other compilers and libraries on the machine, against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toolchain
import torch
from machine import LIBRARY, machine
from tier import FULL, daily

HERE = Path(__file__).parent


def compile_programs(tmp_path_factory: pytest.TempPathFactory, capability: int) -> Path:
    """PTX of triton_programs.py, from a process whose Triton compiles instead of interpreting."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp(f"triton{capability}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    subprocess.run(
        [sys.executable, str(HERE / "triton_programs.py"), str(folder), str(capability)],
        env=environment,
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_programs(tmp_path_factory, 80)


@pytest.fixture(scope="module")
def programs_sm90(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_programs(tmp_path_factory, 90)


def launch(programs: Path, name: str, *arguments: Any, grid: tuple[int, ...]) -> None:
    facts = json.loads((programs / f"{name}.json").read_text())
    # Two hidden parameters: scratch memory of the grid and of the profiler.
    bytes_ = facts["scratch"] * int(np.prod(grid))
    space = np.zeros(bytes_ + 128, np.uint8)
    scratch = space[-space.ctypes.data % 128 :][:bytes_] if bytes_ else np.uint64(0)
    machine.load((programs / f"{name}.ptx").read_text()).launch(
        facts["name"],
        *arguments,
        scratch,
        np.uint64(0),
        grid=grid,
        block=facts["threads"],
        shared=facts["shared"],
    )


def within(got: torch.Tensor, exact: torch.Tensor, share: float) -> None:
    """Error relative to the largest result; NaN counts as wrong."""
    error = (got.double() - exact).abs().max() / exact.abs().max()
    assert error <= share


# Options under which checked programs must give the same results.
CHECKED = [
    {"check": 1, "order": order, "async": moment, "fuel": 300 if order == "seeded" else 20000}
    for order in ("forward", "reverse", "seeded")
    for moment in ("latest", "earliest", "seed:1", "seed:2")
]
MODES: list[dict[str, Any]] = [
    {},
    {"check": 1},
    {"order": "reverse"},
    {"order": "seeded", "seed": 5},
    {"mma": "hardware"},
    *CHECKED * FULL,
]
# Fewer options for programs with wgmma.
SOME = [{"check": 1}, {"async": "earliest"}, {"async": "seed:1", "order": "seeded"}]
MODES_SM90: list[dict[str, Any]] = [
    {"device": "sm_90a"} | mode for mode in (CHECKED if FULL else SOME)
]
MATMULS = [(torch.float16, 1e-6), (torch.bfloat16, 1e-6), (torch.float32, 2e-3)]


def run_matmul(programs: Path, dtype: torch.dtype, share: float, mode: dict[str, Any]) -> None:
    m, n, k, pad = 150, 144, 272, 16
    torch.manual_seed(0)
    a = torch.randn(m, k + pad).to(dtype)
    b = torch.randn(k, n + pad).to(dtype)
    c = torch.full((m, n), float("nan"))
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    sizes = [np.int32(x) for x in (m, n, k, k + pad, n + pad, n)]
    with machine.options(**mode):
        launch(programs, f"matmul_{name}", a, b, c, *sizes, grid=(-(-m // 64), -(-n // 64)))
    within(c, a[:, :k].double() @ b[:, :n].double(), share * (8 if "mma" in mode else 1))


def run_attention(programs: Path, dtype: torch.dtype, length: int, mode: dict[str, Any]) -> None:
    heads, depth = 2, 64
    torch.manual_seed(1)
    q, k, v = (torch.randn(heads, length, depth).to(dtype) for _ in range(3))
    out = torch.full_like(q, float("nan"))
    scale = np.float32(1.4426950408889634 / depth**0.5)
    name = f"attention_{'fp16' if dtype is torch.float16 else 'bf16'}"
    with machine.options(**mode):
        grid = (-(-length // 64), heads)
        launch(programs, name, q, k, v, out, np.int32(length), scale, grid=grid)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    )
    within(out, exact, 1e-3 if dtype is torch.float16 else 8e-3)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("dtype", "share"), MATMULS, ids=["fp16", "bf16", "tf32"])
def test_matmul(programs: Path, dtype: torch.dtype, share: float, mode: dict[str, Any]) -> None:
    run_matmul(programs, dtype, share, mode)


@pytest.mark.parametrize("mode", [*MODES, {"approximate": 1}, {"approximate": -1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("length", [200, 257])
def test_attention(programs: Path, dtype: torch.dtype, length: int, mode: dict[str, Any]) -> None:
    run_attention(programs, dtype, length, mode)


@pytest.mark.parametrize("mode", MODES_SM90, ids=str)
@pytest.mark.parametrize(("dtype", "share"), MATMULS, ids=["fp16", "bf16", "tf32"])
def test_matmul_sm90(
    programs_sm90: Path, dtype: torch.dtype, share: float, mode: dict[str, Any]
) -> None:
    run_matmul(programs_sm90, dtype, share, mode)


@pytest.mark.parametrize("mode", MODES_SM90, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_attention_sm90(programs_sm90: Path, dtype: torch.dtype, mode: dict[str, Any]) -> None:
    run_attention(programs_sm90, dtype, 200, mode)


@pytest.mark.parametrize("mode", MODES_SM90, ids=str)
def test_descriptors_sm90(programs_sm90: Path, mode: dict[str, Any]) -> None:
    torch.manual_seed(2)
    x = torch.randn(70, 128).to(torch.float16)
    out = torch.full_like(x, float("nan"))
    with machine.options(**{"check": 1} | mode):
        launch(programs_sm90, "double_tiles", x, out, np.int32(70), np.int32(128), grid=(3, 2))
    assert torch.equal(out, x + x)


MODES_OF_GEMMS: dict[str, list[dict[str, Any]]] = {
    "80": [{}, {"check": 1}, {"order": "reverse"}],
    "90a": [
        {"check": 1},
        {"async": "earliest", "order": "reverse"},
        *({"async": f"seed:{i}", "order": "seeded", "fuel": 200} for i in range(3)),
    ],
}
# Source, architecture, macros, shapes.
GEMMS = {
    "multistage": ("cutlass_gemm.cu", "80", (), 5),
    "cluster": ("cutlass_gemm_sm90.cu", "90a", (), 2),
    "pingpong": ("cutlass_gemm_sm90.cu", "90a", ("-DPINGPONG",), 1),
}


def compile_gemm(name: str, folder: Path) -> Path:
    """A program with uncompressed PTX of its architecture."""
    nvcc, include = toolchain.nvcc(), toolchain.cutlass_include()
    if nvcc is None or include is None:
        pytest.skip("needs nvcc and the CUTLASS headers")
    source, architecture, macros, _ = GEMMS[name]
    utilities = include.parent / "tools" / "util" / "include"
    if architecture == "90a" and not utilities.is_dir():
        pytest.skip("needs the utilities of CUTLASS")
    program = folder / "gemm"
    target = f"compute_{architecture}"
    flags = ["-std=c++20", "-O1", "-w", "-cudart=shared", "--compress-mode=none"]
    flags += [f"-gencode=arch={target},code={target}", f"-I{include}", f"-I{utilities}", *macros]
    subprocess.run([nvcc, *flags, str(HERE / source), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("name", daily("multistage", "cluster", full=("pingpong",)))
def test_cutlass_gemm(name: str, tmp_path: Path) -> None:
    _, architecture, _, shapes = GEMMS[name]
    program = compile_gemm(name, tmp_path)
    for mode in MODES_OF_GEMMS[architecture] + CHECKED * FULL:
        options = {f"PTXVM_{option.upper()}": str(value) for option, value in mode.items()}
        environment = os.environ | {"LD_LIBRARY_PATH": str(LIBRARY.parent)} | options
        environment["PTXVM_DEVICE"] = f"sm_{architecture}"
        done = subprocess.run([program], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        wrong = [line.split()[3] for line in done.stdout.splitlines()]
        assert wrong == ["0"] * shapes, mode
