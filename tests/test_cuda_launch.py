"""Host code calls the CUDA runtime in one place, which checks every call."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import toolchain

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = toolchain.nvcc()
pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="not a source tree")


def test_one_place_calls_the_runtime():
    calls = re.compile(r"<<<|\bcuda(Memset|Memcpy|Launch|Func|Get|Set|Device|Driver)\w*\(")
    found = {
        str(path.relative_to(CSRC))
        for path in CSRC.rglob("*.cu*")
        if calls.search(path.read_text())
    }
    assert found == {
        "cuda/launch.cu",
        "cuda/arch/sm90/tensor_map.cu",
    }  # asks for one function


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Output of each case of cuda_launch.cpp."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    program = tmp_path_factory.mktemp("launch") / "program"
    command = [NVCC, "-std=c++20", "-cudart=none", "-x", "c++", "-I", CSRC, "-o", program]
    sources = [CSRC / "cuda" / "launch.cu", Path(__file__).with_name("cuda_launch.cpp")]
    subprocess.run([*command, *sources], check=True)
    out = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return dict(line.split(": ", 1) for line in out.splitlines())


def test_the_limit_of_shared_memory_is_raised_once(said):
    """Threads that need different sizes would lower it concurrently."""
    assert said["threads"] == "0 failed, 1 limit, raised once"
    assert said["limit"] == "100352"
    for case in ("another device", "a device behind the table", "another kernel"):
        assert said[case] == "null"
    assert said["too much"] == (
        "needs 100353 bytes of shared memory for a block, of which this device has 100352"
    )


def test_every_error_comes_back(said):
    assert said["launch"] == said["bytes"] == "invalid argument"
    assert said["too many blocks"] == "2^31 - 1 blocks at most on CUDA"
    assert said["no blocks"] == said["no bytes"] == "null" and said["launches"] == "0"
    assert said["multiprocessors"] == "84"


def test_a_call_returns_to_the_device_of_the_caller(said):
    assert said["devices"] == "0, 3, 0"
    assert said["no such device"] == "tokenmill: invalid argument"


def test_an_old_driver_is_named_with_the_one_that_is_needed(said):
    needs = r"this build needs an NVIDIA driver for CUDA (\d+)\.0 \((\d+) or later\)"
    found = re.fullmatch(rf"{needs}; the driver here supports CUDA 12\.4", said["old driver"])
    assert found and (found[1], found[2]) in {("12", "525"), ("13", "580")}
    assert re.fullmatch(rf"{needs}; there is no driver here", said["no driver"])
    assert said["query"] == f"tokenmill: {said['no driver']}"
    assert re.fullmatch(
        r"this build has nothing but PTX for this GPU, which needs an NVIDIA driver for CUDA "
        r"\d+\.\d+ or later; the driver here supports CUDA 12\.4",
        said["PTX"],
    )
