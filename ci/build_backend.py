"""PEP 517 backend: setuptools, plus torch and CUTLASS from existing installations.

The extension uses only torch's stable ABI, so any torch >= MIN_TORCH serves as a source of headers
and link stubs; CUTLASS is needed for headers only. A build environment is isolated from the
environment that the wheel is meant for; this backend searches there by path (never importing
anything) and requests a download only of what is missing, CUTLASS only if CUDA will be built.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import sys
import sysconfig
from pathlib import Path

import cuda_choice
from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

MIN_TORCH = (2, 10)
CUTLASS_REQUIREMENT = "nvidia-cutlass>=4.2"


def _torch_version(root: Path) -> tuple[int, ...] | None:
    try:
        text = (root / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"__version__[^'\"]*['\"](\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else None


def _search_path() -> list[Path]:
    paths = [sysconfig.get_paths()[key] for key in ("platlib", "purelib")]
    paths += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        paths.append(site.getusersitepackages())
    return [Path(p) for p in dict.fromkeys([*paths, *filter(None, sys.path)])]


def find_torch() -> Path | None:
    """The folder of a usable torch package, or None. TOKENMILL_TORCH_ROOT names one explicitly."""
    explicit = os.environ.get("TOKENMILL_TORCH_ROOT")
    candidates = [Path(explicit)] if explicit else [p / "torch" for p in _search_path()]
    for root in candidates:
        version = _torch_version(root)
        if version and version >= MIN_TORCH and (root / "include" / "torch").is_dir():
            return root
    if explicit:
        wanted = ".".join(map(str, MIN_TORCH))
        raise SystemExit(
            f"tokenmill build: TOKENMILL_TORCH_ROOT: must hold torch >= {wanted} with its headers; "
            f"got {explicit}"
        )
    return None


def find_cutlass() -> Path | None:
    """The folder of CUTLASS's headers, or None. TOKENMILL_CUTLASS names it, or a checkout."""
    explicit = os.environ.get("TOKENMILL_CUTLASS")
    if explicit:
        candidates = [Path(explicit) / "include", Path(explicit)]
    else:
        candidates = [p / "cutlass_library" / "source" / "include" for p in _search_path()]
    for folder in candidates:
        if (folder / "cute" / "config.hpp").is_file():
            return folder
    if explicit:
        raise SystemExit(
            f"tokenmill build: TOKENMILL_CUTLASS: must hold include/cute/config.hpp; got {explicit}"
        )
    return None


def find_nvcc() -> Path | None:
    return cuda_choice.find_nvcc(_search_path())


def choose_cuda() -> cuda_choice.Choice:
    """Decides about CUDA kernels and their GPUs. Raises if they are requested but cannot be
    built."""
    return cuda_choice.choose(os.environ, find_nvcc())


def check_platform() -> None:
    """Ends a build that cannot succeed with a one-line error."""
    if not sys.platform.startswith("linux"):
        raise SystemExit(
            f"tokenmill build: platform: kernels are built only on Linux; got {sys.platform}"
        )
    named = os.environ.get("CXX", "").split()
    if not any(shutil.which(name) for name in (*named, "c++", "g++", "clang++")):
        raise SystemExit(
            "tokenmill build: C++ compiler: none was found; install g++ 12 or later "
            "(Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or set CXX"
        )
    headers = Path(sysconfig.get_paths()["include"])
    if "CMAKE_TOOLCHAIN_FILE" not in os.environ and not (headers / "Python.h").is_file():
        raise SystemExit(
            f"tokenmill build: Python: must have its headers (Debian, Ubuntu: apt-get install "
            f"python3-dev; Fedora: dnf install python3-devel); got no {headers}/Python.h"
        )


def _requirements() -> list[str]:
    check_platform()  # before anything is downloaded
    cuda = choose_cuda().cuda
    wanted = [] if find_torch() else [f"torch>={'.'.join(map(str, MIN_TORCH))}"]
    if cuda and not find_cutlass():
        wanted.append(CUTLASS_REQUIREMENT)
    return wanted


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _requirements()
