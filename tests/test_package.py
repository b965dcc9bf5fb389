"""The installed package: import, symbols, command line."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenmill as tm

PACKAGE = Path(tm.__file__).parent


def python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_import_is_light():
    """No CUDA context, no Triton, no benchmark or demo dependency, no samples, no index."""
    code = (
        "import sys, torch, tokenmill\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = ('triton', 'matplotlib', 'rich', 'transformers', 'tokenmill.papers', "
        "'tokenmill.policies', 'tokenmill.evaluation')\n"
        "print([m for m in sys.modules if m in heavy or m.endswith('_cases')])"
    )
    assert python(code).strip() == "[]"


def test_import_of_triton_kernels_needs_no_gpu_and_starts_none():
    pytest.importorskip("triton")
    code = (
        "import pkgutil, importlib, torch, tokenmill.triton_kernels as kernels\n"
        "for module in pkgutil.walk_packages(kernels.__path__, 'tokenmill.triton_kernels.'):\n"
        "    print(importlib.import_module(module.name).__name__)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    names = python(code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0").split()
    assert "tokenmill.triton_kernels.dense.attention" in names


def test_malformed_calls_and_the_fuzzer_are_not_installed():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search("malformed|fuzz", path.relative_to(PACKAGE).as_posix())
        assert not re.search(r"\bMalformed\(|\bMALFORMED\b", path.read_text()), path


def test_what_a_name_can_be_completed_to_is_public():
    code = "import tokenmill as tm; print(*(n for n in dir(tm) if not n.startswith('_')))"
    assert set(python(code).split()) == {n for n in tm.__all__ if not n.startswith("_")}


def test_library_loads_with_every_symbol_bound():
    assert python("import tokenmill; print('ok')", LD_BIND_NOW="1").strip() == "ok"


def test_library_needs_only_the_stable_abi():
    """Only C symbols of torch's stable ABI, no C++ ones, so that one build serves any torch."""
    out = subprocess.run(
        ["nm", "-D", "--undefined-only", PACKAGE / "_ops.so"], capture_output=True, text=True
    )
    if out.returncode:
        pytest.skip("nm is not installed")
    names = [line.split()[-1].split("@")[0] for line in out.stdout.splitlines()]
    assert not [n for n in names if re.match(r"_ZN?K?\d*(2at|3c10|5torch)", n)]
    assert any(n.startswith(("torch_", "aoti_torch_")) for n in names)


def test_torch_has_the_private_names_that_the_package_uses():
    """These names are not guaranteed by any version; rarely used code paths are included."""
    used = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        used.update(re.findall(r"\btorch(?:\.\w+)*\._[A-Za-z]\w*(?:\.\w+)*", source))
        for module, names in re.findall(r"^ *from (torch[\w.]*) import ([\w, ]+)", source, re.M):
            used.update(f"{module}.{name}" for name in names.split(", "))
    missing = []
    for name in sorted(n for n in used if "._" in n):
        try:
            pkgutil.resolve_name(name)
        except (AttributeError, ImportError):
            missing.append(name)
    assert "torch.autograd.function._SingleLevelFunction" in used
    assert not missing, f"torch {torch.__version__} has none of {missing}"


def test_library_holds_no_path_of_its_builder():
    data = (PACKAGE / "_ops.so").read_bytes()
    named = [text for text in data.split(b"\0") if text.endswith((b".cpp", b".cuh", b".cu", b".h"))]
    sources = {re.findall(rb"[\w./+-]+$", text)[0] for text in named}
    assert sources and not [path for path in sources if path.startswith(b"/")]


def test_package_works_without_the_introspection_module():
    code = (
        "import sys; sys.modules['tokenmill._C'] = None\n"
        "import torch, tokenmill as tm\n"
        "x = torch.randn(1, 3, 1, 4); tm.attention(x, x, x); print(list(tm.build_info()))"
    )
    assert python(code).strip() == "['version']"


def test_unknown_instruction_set_is_an_error():
    with pytest.raises(subprocess.CalledProcessError) as error:
        python("import tokenmill", TOKENMILL_CPU_ISA="sse9")
    assert "cpu_isa: select: must be '' or one of 'baseline'" in error.value.stderr
    assert "got 'sse9'" in error.value.stderr


def test_environment_chooses_the_instruction_set():
    code = "import torch, tokenmill; print(torch.ops.tokenmill.cpu_isa())"
    assert python(code, TOKENMILL_CPU_ISA="baseline").strip() == "baseline"


def test_the_command_line_runs():
    done = subprocess.run([sys.executable, "-m", "tokenmill", "info"], capture_output=True)
    assert done.returncode == 0 and b"cpu_isas" in done.stdout, done.stderr


def test_one_thread_equals_many(threads):
    x = torch.randn(2, 300, 4, 64)
    threads(1)
    one = tm.attention(x, x, x)
    threads(3)
    assert torch.equal(one, tm.attention(x, x, x))
