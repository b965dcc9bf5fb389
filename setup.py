"""Drives CMake. Everything that is not a compiler belongs in pyproject.toml.

Environment: TOKENMILL_CUDA=1 builds the CUDA kernels for all default GPUs, 0 leaves them out; where
it is not set they are built for the GPU of this machine (ci/cuda_choice.py);
TOKENMILL_CUDA_ARCHS ("80-real;90a-real") replaces the default list and makes a missing nvcc an
error; TOKENMILL_TORCH_ROOT names a torch package to build against, TOKENMILL_CUTLASS the headers of
CUTLASS; TOKENMILL_CPU_ISAS=native (or "avx2;avx512") builds the CPU kernels for fewer instruction
sets; MAX_JOBS limits parallel compilers. For wheels: TOKENMILL_MANYLINUX=1 needs no library younger
than manylinux_2_28 has; TOKENMILL_PREBUILT names an _ops.so of the same sources and options, next
to which only the bindings of another Python are built. For development: TOKENMILL_PTXVM=1, in
a checkout, adds a library that runs the CUDA kernels on the PTX machine, TOKENMILL_OPS
("select/topk_select;dense/attention") builds the kernels of these operators only,
TOKENMILL_HEAD_DIMS ("64;128;256") attention's CUDA kernels for these head dimensions only,
TOKENMILL_SANITIZE=1 lets AddressSanitizer watch the CPU kernels (run with libasan preloaded).

An editable install puts the libraries into python/tokenmill and keeps the objects in build/, where
the next build of any kind finds them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_backend import check_platform, choose_cuda, find_cutlass, find_nvcc, find_torch
from cuda_choice import Choice
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
    into_source = False  # an editable install, or build_ext --inplace

    def run(self) -> None:
        self.into_source = self.inplace
        super().run()

    def copy_extensions_to_source(self) -> None:
        """CMake has installed them there."""

    def get_output_mapping(self) -> dict[str, str]:
        """What a strict editable install links: the libraries next to _C too."""
        mapping = super().get_output_mapping()
        for built, source in list(mapping.items()):
            for path in libraries(Path(source).parent):
                name = str(path.relative_to(Path(source).parent))
                mapping[str(Path(built).parent / name)] = str(path)
        return mapping

    def build_extension(self, ext: Extension) -> None:
        check_platform()
        cuda = choose_cuda()
        import pybind11

        torch_root = find_torch()
        if torch_root is None:
            raise SystemExit("tokenmill build: torch: no torch >= 2.10 found to build against")
        install = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        temp = self.build_temp
        if self.into_source:
            install = ROOT / "python" / "tokenmill"
            temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")
        ptxvm = PTXVM and cuda.cuda
        build = Path(temp + ("-ptxvm" if ptxvm else "")).resolve()
        build.mkdir(parents=True, exist_ok=True)
        if not ptxvm:  # of an earlier build in this tree: setuptools packs whatever lies there
            (install / "_emulated.so").unlink(missing_ok=True)
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
            **cuda_options(cuda),
        }
        if launcher := shutil.which("ccache"):
            options |= {f"CMAKE_{lang}_COMPILER_LAUNCHER": launcher for lang in ("CXX", "CUDA")}
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        flags = [f"-D{key}={value}" for key, value in options.items()]
        flags += [f"-U{key}" for key in ("TOKENMILL_CUDA_ARCHS",) if key not in options]
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *flags])
        prebuilt = os.environ.get("TOKENMILL_PREBUILT")
        target = "_C" if prebuilt else "all"
        plan = f"{(build / 'built' / 'plan').read_text()}; {cuda.why}; "
        plan += f"{count_objects(build, target)} objects, {jobs} at a time"
        print(f"tokenmill: {plan}", flush=True)
        try:
            subprocess.check_call(["cmake", "--build", str(build), "-j", jobs, "--target", target])
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"tokenmill build: a compiler failed, with the message above ({plan}); where "
                "memory ran out, MAX_JOBS=1 compiles one object at a time"
            ) from None
        part = ["--component", "bindings"] if prebuilt else []
        subprocess.check_call(["cmake", "--install", str(build), *part])
        if prebuilt:
            shutil.copy(prebuilt, install / "_ops.so")


def libraries(package: Path) -> list[Path]:
    """What a build installs next to _C."""
    found = [package / "_ops.so", package / "_emulated.so"]
    return [path for path in found if path.exists()]


def count_objects(build: Path, target: str) -> int:
    """How many object files a target is linked from."""
    ninja = ["ninja", "-C", str(build), "-t", "inputs", target]
    inputs = subprocess.run(ninja, capture_output=True, text=True, check=True).stdout
    return sum(name.endswith(".o") for name in inputs.split())


def cuda_options(choice: Choice) -> dict[str, object]:
    if not choice.cuda:
        return {"TOKENMILL_CUDA": "OFF", "TOKENMILL_PTXVM": "OFF"}
    options: dict[str, object] = {"TOKENMILL_CUDA": "ON"}
    if choice.archs:
        options["TOKENMILL_CUDA_ARCHS"] = ";".join(choice.archs)
    options["TOKENMILL_PTXVM"] = "ON" if PTXVM else "OFF"
    options["CUTLASS_INCLUDE_DIR"] = find_cutlass() or ""
    return options | nvcc_options()


def nvcc_options() -> dict[str, object]:
    """Point CMake at an nvcc that it does not find itself."""
    if os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return {}
    nvcc = find_nvcc()
    assert nvcc is not None  # choose_cuda has asked
    home = nvcc.parents[1]
    options: dict[str, object] = {"CMAKE_CUDA_COMPILER": nvcc, "CUDAToolkit_ROOT": home}
    if (home / "lib64").is_dir():
        return options
    # Wheels have lib where nvcc's profile says lib64, and no unversioned libcudart.so.
    os.environ["LIBRARY_PATH"] = f"{home}/lib:{os.environ.get('LIBRARY_PATH', '')}"
    return options | {"CUDA_CUDART": next((home / "lib").glob("libcudart.so.*"))}


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
