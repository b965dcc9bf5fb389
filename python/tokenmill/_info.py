"""Properties of this build and this machine."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from typing import Any

import torch

from ._call import library
from ._version import __version__

ENVIRONMENT = {
    "TOKENMILL_BACKEND": "backend where a call names none",
    "TOKENMILL_CHECK": "1: check values inside GPU tensors too, synchronising",
    "TOKENMILL_EMULATED": "_emulated.so of a development build, if not next to the package",
    "TOKENMILL_CPU_ISA": "baseline, avx2, avx512, avx512_bf16 or avx512_amx, if it is there",
    "TOKENMILL_TUNE_CACHE": "file of tuned values, if not ~/.cache/tokenmill/tune.json",
    "TRITON_INTERPRET": "1: Triton kernels run in Triton's interpreter, on CPU tensors too",
}


def build_info() -> dict[str, Any]:
    """Version, compilers, instruction sets and GPU architectures of this build.

    Returns:
        A dict with version, compiler, cpu_isas, cuda_version ("" without CUDA), cuda_archs and
        cuda_driver (the oldest NVIDIA driver release on Linux that runs the machine code of the
        CUDA part; a GPU that uses PTX needs a driver for cuda_version). Without the optional module
        tokenmill._C only version is known.

    Example:
        >>> import tokenmill as tm
        >>> "baseline" in tm.build_info()["cpu_isas"]
        True
    """
    try:
        import tokenmill._C as _C
    except ImportError:
        return {"version": __version__}
    return _C.build_info()


def machine() -> dict[str, str]:
    """Machine description used in benchmark results."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "isa": library.native.cpu_isa(),
        "gpu": gpu,
        "driver": _driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _driver() -> str:
    """The CUDA version supported by NVIDIA's driver, without initialising it."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return "none"
    except OSError:
        return "none"
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


@functools.cache
def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
