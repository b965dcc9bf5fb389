"""Kernels that other compilers and libraries made, on the machine, against float64."""

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

HERE = Path(__file__).parent


def compile_programs(tmp_path_factory: pytest.TempPathFactory, capability: int) -> Path:
    """PTX of triton_programs.py, by a process whose Triton compiles and does not interpret."""
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
    scratch = np.uint64(0)  # two hidden parameters: scratch memory of the grid and of the profiler
    machine.load((programs / f"{name}.ptx").read_text()).launch(
        facts["name"],
        *arguments,
        scratch,
        scratch,
        grid=grid,
        block=facts["threads"],
        shared=facts["shared"],
    )


def within(got: torch.Tensor, exact: torch.Tensor, share: float) -> None:
    """Relative to the largest result; NaN counts as wrong."""
    error = (got.double() - exact).abs().max() / exact.abs().max()
    assert error <= share


MODES = [
    {},
    {"check": 1},
    {"order": "reverse"},
    {"order": "seeded", "seed": 5},
    {"mma": "hardware"},
]
# With wgmma.
MODES_SM90 = [
    {"device": "sm_90a"} | mode
    for mode in ({"check": 1}, {"async": "earliest"}, {"async": "seed:1", "order": "seeded"})
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


GEMMS = {
    "cutlass_gemm.cu": ("80", 5, [{}, {"PTXVM_CHECK": "1"}, {"PTXVM_ORDER": "reverse"}]),
    "cutlass_gemm_sm90.cu": (
        "90a",
        2,
        [
            {"PTXVM_CHECK": "1"},
            {"PTXVM_ASYNC": "earliest", "PTXVM_ORDER": "reverse"},
            *(
                {"PTXVM_ASYNC": f"seed:{i}", "PTXVM_ORDER": "seeded", "PTXVM_FUEL": "200"}
                for i in range(3)
            ),
        ],
    ),
}


def compile_gemm(name: str, folder: Path) -> Path:
    """A program with the PTX of its architecture, not compressed."""
    nvcc, include = toolchain.nvcc(), toolchain.cutlass_include()
    if nvcc is None or include is None:
        pytest.skip("needs nvcc and the CUTLASS headers")
    architecture = GEMMS[name][0]
    utilities = include.parent / "tools" / "util" / "include"
    if architecture == "90a" and not utilities.is_dir():
        pytest.skip("needs the utilities of CUTLASS")
    program = folder / "gemm"
    target = f"compute_{architecture}"
    flags = ["-std=c++20", "-O1", "-w", "-cudart=shared", "--compress-mode=none"]
    flags += [f"-gencode=arch={target},code={target}", f"-I{include}", f"-I{utilities}"]
    subprocess.run([nvcc, *flags, str(HERE / name), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("name", GEMMS)
def test_cutlass_gemm(name: str, tmp_path: Path) -> None:
    architecture, shapes, modes = GEMMS[name]
    program = compile_gemm(name, tmp_path)
    for mode in modes:
        environment = os.environ | {"LD_LIBRARY_PATH": str(LIBRARY.parent)} | mode
        environment["PTXVM_DEVICE"] = f"sm_{architecture}"
        done = subprocess.run([program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        wrong = [line.split()[3] for line in done.stdout.splitlines()]
        assert wrong == ["0"] * shapes, mode
