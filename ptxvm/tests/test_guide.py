"""The begin of docs/guide.md: its source, its recipe for NVRTC, and what the command prints."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ptxvm.__main__ import main

GUIDE = (Path(__file__).resolve().parent.parent / "docs" / "guide.md").read_text()
PROMPT = "    $ ptxvm check "


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def printed(command: str) -> str:
    """What the guide shows below the command, without its line breaks."""
    shown = GUIDE.split(PROMPT + command + "\n")[1]
    return " ".join(re.split(r"\n\n(?! )", shown)[0].split())


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: Any) -> Path:
    """Compiles the kernel of the guide as it says, in a folder that its output names."""
    try:
        importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    folder = tmp_path / "me" / "kernels"
    folder.mkdir(parents=True)
    (folder / "reverse.cu").write_text(block("cuda"))
    (folder / "to_ptx.py").write_text(block("python"))
    monkeypatch.chdir(folder)
    subprocess.run([sys.executable, "to_ptx.py", "reverse.cu"], check=True)
    return folder


def test_the_first_example(kernels: Path, capfd: Any) -> None:
    (command,) = re.findall(re.escape(PROMPT) + r"(.*)", GUIDE)
    words = shlex.split(command)
    assert main(["check", *words]) == 1
    assert " ".join(capfd.readouterr().out.split()) == printed(command)
    source = (kernels / "reverse.cu").read_text()
    barrier = "  __syncthreads();\n  out["
    (kernels / "reverse.cu").write_text(source.replace("  out[", barrier))
    subprocess.run([sys.executable, "to_ptx.py", "reverse.cu"], check=True)
    assert main(["check", *words]) == 0
    assert f"`{capfd.readouterr().out.strip()}`" in " ".join(GUIDE.split())


def test_the_workflow(kernels: Path) -> None:
    steps = re.findall(r"- run: (.*)", block("yaml"))
    (check,) = (shlex.split(step) for step in steps if step.startswith("ptxvm "))
    assert "python to_ptx.py reverse.cu" in steps
    assert main(check[1:]) == 1
    (written,) = re.findall(r"sarif_file: (.*)", block("yaml"))
    assert '"uri": "reverse.cu"' in (kernels / written).read_text()


def test_the_recipe_says_why_a_source_does_not_compile(kernels: Path) -> None:
    (kernels / "bad.cu").write_text("__global__ void k() { int x = ; }\n")
    done = subprocess.run(
        [sys.executable, "to_ptx.py", "bad.cu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "bad.cu(1): error: expected an expression" in done.stderr
    assert not (kernels / "bad.ptx").exists()
