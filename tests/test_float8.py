"""Conversions of float8_e4m3fn on a CPU and in Triton: all codes, and all float16 values."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import backends, device_of

import tokenmill as tm
from tokenmill.reference.float8 import float8_codes

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
FLAGS = {"baseline": (), "avx2": AVX2, "avx512": AVX512}


def float8_inputs() -> torch.Tensor:
    """All float16 values, the midpoints between codes, and their neighbors in float32."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    far = torch.tensor([448.0, 464.0, 480.0, 1e5, 3.4e38, 1e-45, 1e-38, float("inf")])
    near = torch.cat([middles, codes, far])
    near = torch.cat([torch.nextafter(near, torch.tensor(x)) for x in (0.0, 1e39)] + [near])
    return torch.cat([halves, near, -near])


def test_the_reference_is_the_cast_of_pytorch_with_saturation():
    x = float8_inputs()
    codes = float8_codes(x)
    known = x.abs() <= 448
    assert torch.equal(codes[known], x[known].to(torch.float8_e4m3fn).view(torch.uint8))
    assert (codes[x > 448] == 0x7E).all() and (codes[x < -448] == 0xFE).all()
    assert (codes[x.isnan()] == 0x7F).all()


def check_float8(codes_of, values_of):
    """Compares codes_of(float32) and values_of(uint8) with PyTorch."""
    x = float8_inputs()
    assert torch.equal(codes_of(x), float8_codes(x))
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    want = codes.view(torch.float8_e4m3fn).float()
    found = values_of(codes)
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.nan_to_num().view(torch.int32), want.nan_to_num().view(torch.int32))


@pytest.mark.skipif(not CSRC.exists(), reason="not a source tree")
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
@pytest.mark.parametrize("isa", [isa for isa in tm.testing.cpu_isas() if isa in FLAGS])
def test_cpu(isa, tmp_path):
    library = tmp_path / "float8.so"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wno-psabi", "-fno-trapping-math"]
    flags += [*FLAGS[isa], f"-DTOKENMILL_ISA={isa}", f"-I{CSRC}"]
    subprocess.run(["c++", *flags, HERE / "float8.cpp", "-o", library], check=True)
    functions = ctypes.CDLL(str(library))

    def run(name, x, dtype):
        to = torch.empty(x.shape, dtype=dtype)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, to))
        getattr(functions, name)(*pointers, ctypes.c_int64(x.numel()))
        return to

    check_float8(
        lambda x: run("codes_of", x, torch.uint8), lambda x: run("values_of", x, torch.float32)
    )


@pytest.mark.skipif("triton" not in backends(), reason="no Triton")
def test_triton():
    from float8_triton import convert_codes, convert_values

    device = device_of("triton")
    check_float8(
        lambda x: convert_codes(x.to(device)).cpu(), lambda x: convert_values(x.to(device)).cpu()
    )
