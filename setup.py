"""Drives CMake. Everything that is not a compiler belongs in pyproject.toml.

Environment: TOKENMILL_CPU_ONLY=1 leaves CUDA out; TOKENMILL_CUDA_ARCHS ("80-real;90a-real")
replaces the default list and makes a missing nvcc an error; TOKENMILL_TORCH_ROOT names a torch
package to build against, TOKENMILL_CUTLASS the headers of CUTLASS; TOKENMILL_CPU_ISAS=native (or
"avx2;avx512") builds the CPU kernels for fewer instruction sets; MAX_JOBS limits parallel
compilers. For wheels: TOKENMILL_MANYLINUX=1 needs no library younger than manylinux_2_28 has;
TOKENMILL_PREBUILT names an _ops.so of the same sources and options, beside which the bindings of
another Python are built alone. For development: TOKENMILL_PTXVM=1 adds the PTX machine,
TOKENMILL_OPS ("select/topk_select;dense/attention") builds the kernels of these operators alone,
TOKENMILL_HEAD_DIMS ("64;128;256") attention's CUDA kernels for these head dimensions alone,
TOKENMILL_SANITIZE=1 lets AddressSanitizer watch the CPU kernels (run with libasan preloaded).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_backend import check_platform, find_cutlass, find_torch
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PTXVM = os.environ.get("TOKENMILL_PTXVM") == "1"
MAPPED = {"tokenmill.triton_kernels": "triton_kernels", "tokenmill.bench": "bench"}


def mapped_packages() -> dict[str, str]:
    """The packages that live outside python/, with their folders."""
    found = dict(MAPPED)
    for package, folder in MAPPED.items():
        found |= {
            f"{package}.{p}": f"{folder}/{p.replace('.', '/')}" for p in find_packages(folder)
        }
    return found


class BuildPy(build_py):
    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if not m[1].startswith("test_")]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_platform()
        import pybind11

        torch_root = find_torch()
        if torch_root is None:
            raise SystemExit("tokenmill build: torch: no torch >= 2.10 found to build against")
        install = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp + ("-ptxvm" if PTXVM else "")).resolve()
        build.mkdir(parents=True, exist_ok=True)
        if not PTXVM:  # of an earlier build in this tree: setuptools packs whatever lies there
            (install / "_emulated.so").unlink(missing_ok=True)
            shutil.rmtree(install / "_ptxvm", ignore_errors=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": install,
            # The build environment of an earlier build in this tree is gone, and its ninja with it.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_ROOT": torch_root,
            "TOKENMILL_VERSION": self.distribution.get_version(),
            "TOKENMILL_CPU_ISAS": os.environ.get("TOKENMILL_CPU_ISAS", ""),
            "TOKENMILL_OPS": os.environ.get("TOKENMILL_OPS", ""),
            "TOKENMILL_HEAD_DIMS": os.environ.get("TOKENMILL_HEAD_DIMS", ""),
            **{
                name: "ON" if os.environ.get(name) == "1" else "OFF"
                for name in ("TOKENMILL_MANYLINUX", "TOKENMILL_SANITIZE")
            },
            **cuda_options(),
        }
        if launcher := shutil.which("ccache"):
            options |= {f"CMAKE_{lang}_COMPILER_LAUNCHER": launcher for lang in ("CXX", "CUDA")}
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        flags = [f"-D{key}={value}" for key, value in options.items()]
        flags += [f"-U{key}" for key in ("TOKENMILL_CUDA_ARCHS",) if key not in options]
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *flags])
        prebuilt = os.environ.get("TOKENMILL_PREBUILT")
        target = "_C" if prebuilt else "all"
        subprocess.check_call(["cmake", "--build", str(build), "-j", jobs, "--target", target])
        part = ["--component", "bindings"] if prebuilt else []
        subprocess.check_call(["cmake", "--install", str(build), *part])
        if prebuilt:
            shutil.copy(prebuilt, install / "_ops.so")


def cuda_options() -> dict[str, object]:
    if os.environ.get("TOKENMILL_CPU_ONLY") == "1":
        return {"TOKENMILL_CUDA": "OFF"}
    archs = os.environ.get("TOKENMILL_CUDA_ARCHS")
    options: dict[str, object] = {"TOKENMILL_CUDA": "ON" if archs else "AUTO"}
    if archs:
        options["TOKENMILL_CUDA_ARCHS"] = archs
    options["TOKENMILL_PTXVM"] = "ON" if PTXVM else "OFF"
    options["CUTLASS_INCLUDE_DIR"] = find_cutlass() or ""
    return options | pypi_nvcc_options()


def pypi_nvcc_options() -> dict[str, object]:
    """Point CMake at an nvcc from PyPI wheels (site-packages/nvidia/cuXX) if no other is there."""
    if shutil.which("nvcc") or "CUDACXX" in os.environ:
        return {}
    homes = (Path(p) / "nvidia" for p in sys.path if p)
    found = [nvcc.parents[1] for home in homes for nvcc in sorted(home.glob("cu1*/bin/nvcc"))]
    if not found:
        return {}
    home = found[-1]
    # These wheels have lib where nvcc's profile says lib64, and no unversioned libcudart.so.
    os.environ["LIBRARY_PATH"] = f"{home}/lib:{os.environ.get('LIBRARY_PATH', '')}"
    return {
        "CMAKE_CUDA_COMPILER": home / "bin" / "nvcc",
        "CUDAToolkit_ROOT": home,
        "CUDA_CUDART": next((home / "lib").glob("libcudart.so.*")),
    }


mapped = mapped_packages()
setup(
    packages=[*find_packages("python"), *mapped],
    py_modules=["tokenmill_vllm"],
    package_dir={"": "python", **mapped},
    package_data={
        "tokenmill": ["py.typed", "_C.pyi"],
        "tokenmill.bench": ["peer_counters.json"],
    },
    ext_modules=[Extension("tokenmill._C", [])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
