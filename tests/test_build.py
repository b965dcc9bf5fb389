"""The in-tree build backend: which torch and CUTLASS it takes. Runs in a source tree alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BACKEND = Path(__file__).resolve().parents[1] / "ci" / "build_backend.py"
pytestmark = pytest.mark.skipif(not BACKEND.exists(), reason="not a source tree")


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("build_backend", BACKEND)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_backend", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module._setuptools, "get_requires_for_build_wheel", lambda config: [])
    for name in ("TOKENMILL_TORCH_ROOT", "TOKENMILL_CUTLASS", "TOKENMILL_CUDA_ARCHS", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOKENMILL_CPU_ONLY", "1")
    return module


def fake_torch(folder: Path, version: str) -> Path:
    root = folder / "torch"
    (root / "include" / "torch").mkdir(parents=True)
    (root / "version.py").write_text(f"__version__ = '{version}'\n")
    return root


def test_torch_of_the_environment_is_used(backend):
    assert backend.find_torch() is not None
    assert backend.get_requires_for_build_wheel() == []


def test_an_empty_environment_asks_for_torch(backend, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "_search_path", lambda: [tmp_path])
    assert backend.find_torch() is None
    assert backend.get_requires_for_build_wheel() == ["torch>=2.10"]
    assert "torch>=2.10" in backend.get_requires_for_build_editable()


@pytest.mark.parametrize(
    ("version", "usable"),
    [("2.9.1", False), ("2.10.0+cu128", True), ("2.13.0+cpu", True), ("3.0.0a0", True)],
)
def test_version_of_a_found_torch(backend, monkeypatch, tmp_path, version, usable):
    root = fake_torch(tmp_path, version)
    monkeypatch.setattr(backend, "_search_path", lambda: [tmp_path])
    assert (backend.find_torch() == root) is usable


def test_an_explicit_root_must_be_good(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENMILL_TORCH_ROOT", str(tmp_path))
    with pytest.raises(SystemExit, match=r"must hold torch >= 2\.10 with its headers; got"):
        backend.find_torch()
    root = fake_torch(tmp_path, "2.12.0")
    monkeypatch.setenv("TOKENMILL_TORCH_ROOT", str(root))
    assert backend.find_torch() == root


def test_cutlass_is_asked_for_where_cuda_is_built(backend, monkeypatch, tmp_path):
    torch_root = fake_torch(tmp_path, "2.12.0")
    monkeypatch.setenv("TOKENMILL_TORCH_ROOT", str(torch_root))
    monkeypatch.setattr(backend, "_search_path", lambda: [tmp_path])
    assert backend.get_requires_for_build_wheel() == []
    monkeypatch.delenv("TOKENMILL_CPU_ONLY")
    monkeypatch.setattr(backend.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert backend.get_requires_for_build_wheel() == ["nvidia-cutlass>=4.2"]
    headers = tmp_path / "cutlass_library" / "source" / "include"
    (headers / "cute").mkdir(parents=True)
    (headers / "cute" / "config.hpp").touch()
    assert backend.find_cutlass() == headers
    assert backend.get_requires_for_build_wheel() == []


def test_an_explicit_cutlass_must_be_good(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENMILL_CUTLASS", str(tmp_path))
    with pytest.raises(SystemExit, match=r"must hold include/cute/config\.hpp; got"):
        backend.find_cutlass()
    (tmp_path / "include" / "cute").mkdir(parents=True)
    (tmp_path / "include" / "cute" / "config.hpp").touch()
    assert backend.find_cutlass() == tmp_path / "include"
