"""Conversions of float8_e4m3fn in CUDA: all codes, and all float16 values."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import toolchain
import torch
from test_float8 import check_float8

ptxvm = pytest.importorskip("ptxvm", reason="the package ptxvm is not installed")

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
NVCC = toolchain.nvcc()
THREADS = 256


@pytest.mark.skipif(not CSRC.exists(), reason="not a source tree")
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_cuda(tmp_path):
    ptx = tmp_path / "float8.ptx"
    flags = ["-ptx", "-std=c++20", "-arch=compute_80", f"-I{CSRC}"]
    command = [NVCC, *flags, HERE / "float8.cu", "-o", ptx]
    subprocess.run(command, check=True, capture_output=True)
    module = ptxvm.machine().load(ptx.read_text())

    def run(name, x, dtype):
        to = torch.empty(x.shape, dtype=dtype)
        blocks = -(-x.numel() // THREADS)
        module.launch(name, x, to, np.int32(x.numel()), grid=blocks, block=THREADS)
        return to

    check_float8(
        lambda x: run("codes_of", x, torch.uint8), lambda x: run("values_of", x, torch.float32)
    )
