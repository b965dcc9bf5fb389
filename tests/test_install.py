"""pip in a source tree: the GPUs that a build targets, an editable install, and the variables that
the documents name. Nothing here compiles."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tokenmill as tm

ROOT = Path(__file__).resolve().parents[1]
CHOICE = ROOT / "ci" / "cuda_choice.py"
pytestmark = pytest.mark.skipif(not CHOICE.exists(), reason="not a source tree")
NVCC = Path("/cuda/bin/nvcc")
KNOWN = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


@pytest.fixture
def choice(monkeypatch):
    spec = importlib.util.spec_from_file_location("cuda_choice", CHOICE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cuda_choice", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("gpus", "archs"),
    [
        ([(9, 0)], ("90a-real", "80-virtual")),
        ([(9, 0)] * 8, ("90a-real", "80-virtual")),
        ([(12, 0), (8, 6)], ("86-real", "120f-real", "80-virtual")),
        ([(7, 5), (10, 0)], ("100f-real", "80-virtual")),
        ([(13, 0)], ("80-virtual",)),  # newer than this nvcc
    ],
)
def test_a_build_is_for_the_gpus_that_it_sees(choice, gpus, archs):
    made = choice.choose({}, NVCC, gpus, KNOWN)
    assert made.cuda and made.archs == archs
    assert made.why == "for the GPU of this machine"


@pytest.mark.parametrize(
    ("nvcc", "gpus", "why"),
    [
        (NVCC, [], "no CUDA: no GPU is visible (TOKENMILL_CUDA=1 builds it)"),
        (NVCC, [(7, 5)], "no CUDA: the GPU has compute capability 7.5, 8.0 or later is needed"),
        (None, [(9, 0)], "no CUDA: no nvcc was found"),
    ],
)
def test_a_build_without_cuda_says_why(choice, nvcc, gpus, why):
    made = choice.choose({}, nvcc, gpus, KNOWN)
    assert not made.cuda and made.why.startswith(why)


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        ({"TOKENMILL_CUDA": "1"}, ()),
        ({"TOKENMILL_PTXVM": "1"}, ()),
        ({"TOKENMILL_CUDA_ARCHS": "90a-real;80-virtual"}, ("90a-real", "80-virtual")),
        ({"TOKENMILL_CUDA": "1", "TOKENMILL_CUDA_ARCHS": "80-virtual"}, ("80-virtual",)),
    ],
)
def test_cuda_that_is_asked_for_is_built_or_an_error(choice, asked, archs):
    """Without a GPU, and with a GPU other than the requested one."""
    for gpus in ([], [(9, 0)]):
        made = choice.choose(asked, NVCC, gpus, KNOWN)
        assert made.cuda and made.archs == archs
        assert made.why == f"{next(iter(asked))} asks for it"
    first = next(iter(asked))
    with pytest.raises(SystemExit, match=f"^tokenmill build: {first}: asks for CUDA, and no nvcc"):
        choice.choose(asked, None, [(9, 0)], KNOWN)


def test_cuda_that_is_left_out_is_left_out(choice):
    others = {"TOKENMILL_CUDA_ARCHS": "90a-real", "TOKENMILL_PTXVM": "1"}
    made = choice.choose({"TOKENMILL_CUDA": "0", **others}, None, [(9, 0)], KNOWN)
    assert (made.cuda, made.why) == (False, "no CUDA: TOKENMILL_CUDA=0")
    with pytest.raises(SystemExit, match="TOKENMILL_CUDA: must be 0 or 1; got no"):
        choice.choose({"TOKENMILL_CUDA": "no"}, NVCC, [], KNOWN)


class Driver:
    """Stand-in for libcuda.so.1 on a machine with GPUs of these compute capabilities."""

    def __init__(self, capabilities, status=0):
        self.capabilities, self.status = capabilities, status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capabilities[device.value][{75: 0, 76: 1}[attribute]]
        return 0


def test_gpus_are_what_the_driver_shows(choice, monkeypatch):
    monkeypatch.setattr(choice.ctypes, "CDLL", lambda name: Driver([(8, 9), (9, 0)]))
    assert choice.visible_gpus() == [(8, 9), (9, 0)]
    monkeypatch.setattr(choice.ctypes, "CDLL", lambda name: Driver([(9, 0)], status=100))
    assert choice.visible_gpus() == []  # CUDA_ERROR_NO_DEVICE

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(choice.ctypes, "CDLL", absent)
    assert choice.visible_gpus() == []


CMAKE = """#!{python}
import shutil, sys
from pathlib import Path
words = sys.argv[1:]
folder = Path(words[words.index("-B") + 1] if "-B" in words else words[1])
if "-B" in words:
    (folder / "built").mkdir()
    (folder / "built" / "plan").write_text("CPU kernels for baseline")
    (prefix,) = (w.partition("=")[2] for w in words if w.startswith("-DCMAKE_INSTALL_PREFIX="))
    (folder / "prefix").write_text(prefix)
if words[0] == "--install":
    prefix = Path((folder / "prefix").read_text())
    prefix.mkdir(parents=True, exist_ok=True)
    for library in {libraries}:
        (prefix / Path(library).name).symlink_to(library)
"""


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """A copy of the tree, the unpacked wheel of its editable install, and the output of the build.
    A script stands in for CMake and installs the libraries of the package under test."""
    pytest.importorskip("setuptools")
    base = tmp_path_factory.mktemp("editable")
    tree, tools, wheel = base / "tree", base / "tools", base / "wheel"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results", "*.egg-info")
    for folder in ("ci", "python", "bench", "triton_kernels"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignored)
    for name in ("bench", "triton_kernels"):  # manual links, which are not needed
        (tree / "python" / "tokenmill" / name).unlink(missing_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.txt"):
        shutil.copy(ROOT / name, tree)
    tools.mkdir()
    package = Path(tm.__file__).parent
    libraries = [str(p.resolve()) for p in (package / "_ops.so", *package.glob("_C.*.so"))]
    for name, text in {
        "cmake": CMAKE.format(python=sys.executable, libraries=libraries),
        "ninja": "#!/bin/sh\necho a.cpp a.o b.o\n",
        "c++": "#!/bin/sh\n",
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "pybind11.py").write_text("def get_cmake_dir():\n    return ''\n")
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": f"{tree / 'ci'}:{tools}",
        "TOKENMILL_CUDA": "0",
        "MAX_JOBS": "1",
        "CMAKE_TOOLCHAIN_FILE": "",  # skips the search for Python headers
    }
    code = f"import build_backend; build_backend.build_editable({str(base)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = base.glob("*.whl")
    shutil.unpack_archive(archive, wheel, "zip")
    return tree, wheel, done.stdout


def test_a_build_prints_what_it_builds(editable):
    plan = "tokenmill: CPU kernels for baseline; no CUDA: TOKENMILL_CUDA=0; 2 objects, 1 at a time"
    assert plan in editable[2].splitlines()


def test_an_editable_install_imports_from_the_tree(editable):
    """Kernels and packages outside python/ are importable, without manual links."""
    tree, wheel, _ = editable
    code = (
        f"import site, sys; site.addsitedir({str(wheel)!r})\n"
        "sys.meta_path.insert(0, sys.meta_path.pop())  # before an installed package\n"
        "import tokenmill, tokenmill.bench.run, tokenmill.triton_kernels, torch\n"
        "from tokenmill._call.library import LIBRARY_PATH\n"
        "print(tokenmill.__file__, LIBRARY_PATH, tokenmill.bench.run.__file__,\n"
        "      tokenmill.triton_kernels.__file__, sep='\\n')\n"
        "x = torch.ones(1, 3, 1, 8)\n"
        "print(tokenmill.attention(x, x, x, backend='cpu').sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=wheel, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(tree / "python" / "tokenmill" / "__init__.py"),
        str(tree / "python" / "tokenmill" / "_ops.so"),
        str(tree / "bench" / "run.py"),
        str(tree / "triton_kernels" / "__init__.py"),
        "24.0",
    ]


def test_an_editable_install_keeps_its_objects(editable):
    """They stay in the folder where the next build of the tree finds them."""
    (folder,) = (editable[0] / "build").glob("temp.*")
    assert (folder / "built" / "plan").exists()


def test_a_tree_without_its_build_says_how_to_build(tmp_path):
    package = tmp_path / "python" / "tokenmill"
    package.mkdir(parents=True)
    with pytest.raises(ImportError, match=r"_ops\.so is missing: the package was not built"):
        tm._call.library.find_ops(package)
    (tmp_path / "CMakeLists.txt").touch()
    with pytest.raises(ImportError, match="is a source tree without its build: pip install -e"):
        tm._call.library.find_ops(package)
    (package / "_ops.so").touch()
    assert tm._call.library.find_ops(package) == package / "_ops.so"


def test_documents_name_variables_that_something_reads():
    used = set()
    for folder in ("ci", "python", "bench", "csrc", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in ("", ".py", ".sh", ".cpp", ".h", ".cu", ".cuh"):
                used |= set(re.findall(r"\bTOKENMILL_[A-Z0-9_]*[A-Z0-9]", path.read_text("utf-8")))
    used |= set(re.findall(r"\bTOKENMILL_[A-Z0-9_]*[A-Z0-9]", (ROOT / "setup.py").read_text()))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        named = set(re.findall(r"\bTOKENMILL_[A-Z0-9_]*[A-Z0-9]", page.read_text()))
        assert named <= used, page
