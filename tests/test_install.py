"""What pip runs in a source tree: for which GPUs a build is, and the variables that the documents
name. Nothing here compiles."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

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
    """Without a GPU, and for no other one than asked for where there is one."""
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
    """libcuda.so.1 of a machine with GPUs of these compute capabilities."""

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


def test_documents_name_variables_that_something_reads():
    used = set()
    for folder in ("ci", "python", "bench", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in ("", ".py", ".sh", ".cpp", ".h", ".cu", ".cuh"):
                used |= set(re.findall(r"\bTOKENMILL_[A-Z0-9_]*[A-Z0-9]", path.read_text("utf-8")))
    used |= set(re.findall(r"\bTOKENMILL_[A-Z0-9_]*[A-Z0-9]", (ROOT / "setup.py").read_text()))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        named = set(re.findall(r"\bTOKENMILL_[A-Z0-9_]*[A-Z0-9]", page.read_text()))
        assert named <= used, page
