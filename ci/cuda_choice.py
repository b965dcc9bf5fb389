"""Choice of CUDA kernels for a build, and of their GPUs.

TOKENMILL_CUDA=1, a list in TOKENMILL_CUDA_ARCHS or TOKENMILL_PTXVM=1 requests them: a missing nvcc
is then an error. TOKENMILL_CUDA=0 leaves them out, in any case. Otherwise they are built if both
nvcc and a GPU exist, for this GPU: the default list takes 40 minutes on two cores.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SYSTEM_NVCC = Path("/usr/local/cuda/bin/nvcc")
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Choice:
    """archs: TOKENMILL_CUDA_ARCHS for CMake; empty: its default list."""

    cuda: bool
    why: str
    archs: tuple[str, ...] = ()


def find_nvcc(path: Sequence[Path] = ()) -> Path | None:
    """nvcc of CUDACXX, PATH, /usr/local/cuda or the wheels (nvidia/cuXX) in the folders."""
    if found := os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return Path(found)
    if SYSTEM_NVCC.is_file():
        return SYSTEM_NVCC
    wheels = [nvcc for p in path for nvcc in sorted(p.glob("nvidia/cu1*/bin/nvcc"))]
    return wheels[-1] if wheels else None


def visible_gpus() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that the driver shows to this process."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
        found.append((major.value, minor.value))
    return found


def known_chips(nvcc: Path | None) -> list[str]:
    """The chips (sm_90, ...) for which nvcc generates machine code."""
    if nvcc is None:
        return []
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    return listed.stdout.split()


def architectures(capabilities: Sequence[tuple[int, int]], known: Sequence[str]) -> tuple[str, ...]:
    """TOKENMILL_CUDA_ARCHS for GPUs of these compute capabilities: machine code if nvcc supports
    them, and the PTX that every GPU from sm_80 up can run."""
    machine_code = []
    for major, minor in sorted(set(capabilities)):
        if f"sm_{major}{minor}" in known:
            suffix = {9: "a", 10: "f", 11: "f", 12: "f"}.get(major, "")
            machine_code.append(f"{major}{minor}{suffix}-real")
    return (*machine_code, "80-virtual")


def choose(
    environment: Mapping[str, str],
    nvcc: Path | None,
    gpus: Sequence[tuple[int, int]] | None = None,
    known: Sequence[str] | None = None,
) -> Choice:
    """gpus and known are looked up if they are not given and needed."""
    asked = environment.get("TOKENMILL_CUDA", "")
    archs = tuple(a for a in environment.get("TOKENMILL_CUDA_ARCHS", "").split(";") if a)
    if asked not in ("", "0", "1"):
        raise SystemExit(f"tokenmill build: TOKENMILL_CUDA: must be 0 or 1; got {asked}")
    if asked == "0":
        return Choice(False, "no CUDA: TOKENMILL_CUDA=0")
    by = [
        name
        for name, wanted in (
            ("TOKENMILL_CUDA", asked),
            ("TOKENMILL_CUDA_ARCHS", archs),
            ("TOKENMILL_PTXVM", environment.get("TOKENMILL_PTXVM") == "1"),
        )
        if wanted
    ]
    if by and nvcc is None:
        raise SystemExit(
            f"tokenmill build: {by[0]}: asks for CUDA, and no nvcc was found; install the CUDA "
            "toolkit or the package nvidia-cuda-nvcc, or name the compiler in CUDACXX "
            "(TOKENMILL_CUDA=0 builds the CPU kernels only)"
        )
    if by:
        return Choice(True, f"{by[0]} asks for it", archs)
    if nvcc is None:
        return Choice(False, "no CUDA: no nvcc was found")
    gpus = visible_gpus() if gpus is None else gpus
    if not gpus:
        return Choice(False, "no CUDA: no GPU is visible (TOKENMILL_CUDA=1 builds it)")
    usable = [capability for capability in gpus if capability >= (8, 0)]
    if not usable:
        major, minor = max(gpus)
        return Choice(
            False,
            f"no CUDA: the GPU has compute capability {major}.{minor}, 8.0 or later is needed "
            "(TOKENMILL_CUDA=1 builds it)",
        )
    known = known_chips(nvcc) if known is None else known
    return Choice(True, "for the GPU of this machine", architectures(usable, known))
