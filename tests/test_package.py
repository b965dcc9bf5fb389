"""The installed package as such: import, symbols, command line."""

from __future__ import annotations

import importlib.util
import os
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
    """No CUDA context, no Triton, no benchmark or demo dependency."""
    code = (
        "import sys, torch, tokenmill\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([m for m in ('triton', 'matplotlib', 'rich', 'transformers') if m in sys.modules])"
    )
    assert python(code).strip() == "[]"


def test_library_loads_with_every_symbol_bound():
    assert python("import tokenmill; print('ok')", LD_BIND_NOW="1").strip() == "ok"


def test_library_needs_only_the_stable_abi():
    """C symbols of torch's stable ABI, no C++ ones: that is what lets one build serve any torch."""
    out = subprocess.run(
        ["nm", "-D", "--undefined-only", PACKAGE / "_ops.so"], capture_output=True, text=True
    )
    if out.returncode:
        pytest.skip("nm is not installed")
    names = [line.split()[-1].split("@")[0] for line in out.stdout.splitlines()]
    assert not [n for n in names if re.match(r"_ZN?K?\d*(2at|3c10|5torch)", n)]
    assert any(n.startswith(("torch_", "aoti_torch_")) for n in names)


def test_library_holds_no_path_of_its_builder():
    data = (PACKAGE / "_ops.so").read_bytes()
    sources = set(re.findall(rb"[\w./+-]+\.(?:cpp|cuh|cu|h)(?=\0)", data))
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


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenmill", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_info_names_build_machine_and_backends():
    out = cli("info").stdout
    for word in ("version", "cpu_isas", "cuda_archs", "torch", "reference", "TOKENMILL_BACKEND"):
        assert word in out


def test_ops_is_the_table_of_the_registry():
    lines = cli("ops").stdout.splitlines()
    assert lines[0].split() == ["operator", "family", *tm.dispatch.BACKENDS]
    rows = {line.split()[0]: line.split()[1:] for line in lines if not line.startswith(" ")}
    assert set(tm.registry.ops()) <= set(rows)
    assert rows["attention"][:2] == ["dense", "yes"] and rows["attention"][-1] == "yes"


def test_explain_speaks_for_samples():
    assert cli("explain", "attention").stdout.startswith("tokenmill.attention: cpu (")
    out = cli("explain", "attention", "--sample", "packed", "--dtype", "float64").stdout
    assert out.startswith("tokenmill.attention: reference (")
    assert "not cpu: float64 runs on the reference backend alone" in out
    missing = cli("explain", "attention", "--sample", "nothing")
    assert missing.returncode == 2 and "there are: softmax" in missing.stderr


def test_check_passes_and_can_fail(monkeypatch, capsys):
    assert cli("check", "merge_attention_states", "--backend", "cpu").returncode == 0
    from tokenmill import __main__ as main

    monkeypatch.setattr(tm.testing, "budget", lambda *args, **kwargs: 1e-30)
    assert main.main(["check", "attention", "--backend", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_bench_writes_results(tmp_path):
    target = tmp_path / "r.json"
    done = cli(
        "bench", "merge_attention_states", "--seconds", "0.1", "--json", str(target),
        *(["--plot", str(tmp_path)] if importlib.util.find_spec("matplotlib") else []),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert target.exists() and "eager" in done.stdout
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "merge_attention_states.png").stat().st_size > 1000
    assert cli("bench", "--filter", "no such case").returncode == 2
    assert "sigmoid dense S=512" in cli("bench", "--list").stdout


def test_one_thread_equals_many(threads):
    x = torch.randn(2, 300, 4, 64)
    threads(1)
    one = tm.attention(x, x, x)
    threads(3)
    assert torch.equal(one, tm.attention(x, x, x))
