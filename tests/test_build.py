"""The source tree: torch and CUTLASS versions that the build backend accepts, contents of the
sdist, the project that ci/hub writes, the rules of ci/rules and the chips for which ci/gpu builds.
Runs only in a source tree; tests/test_install.py covers the choice of CUDA and the editable
install."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BACKEND = ROOT / "ci" / "build_backend.py"
pytestmark = pytest.mark.skipif(not BACKEND.exists(), reason="not a source tree")


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(BACKEND.parent))
    spec = importlib.util.spec_from_file_location("build_backend", BACKEND)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_backend", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module._setuptools, "get_requires_for_build_wheel", lambda config: [])
    for name in ("TORCH_ROOT", "CUTLASS", "CUDA_ARCHS", "PTXVM"):
        monkeypatch.delenv(f"TOKENMILL_{name}", raising=False)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("TOKENMILL_CUDA", "0")
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
    monkeypatch.setenv("TOKENMILL_CUDA", "1")
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


@pytest.mark.parametrize(
    ("platform", "compiler", "line"),
    [
        ("darwin", "/usr/bin/c++", "platform: kernels are built only on Linux; got darwin"),
        ("win32", None, "platform: kernels are built only on Linux; got win32"),
        ("linux", None, r"C\+\+ compiler: none was found; install g\+\+ 12 or later"),
    ],
)
def test_a_build_that_cannot_succeed_ends_in_a_line(backend, monkeypatch, platform, compiler, line):
    monkeypatch.setattr(backend.sys, "platform", platform)
    monkeypatch.setattr(backend.shutil, "which", lambda name: compiler)
    with pytest.raises(SystemExit, match=f"^tokenmill build: {line}"):
        backend.get_requires_for_build_wheel()


def git_files(*folders: str) -> list[str]:
    """Files of the working tree, including untracked files of the next commit."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a clone")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """File names in the sdist of a copy of the tree with leftovers of builds."""
    pytest.importorskip("setuptools")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for name in git_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    for stray in (
        "build/temp/a.o",
        "dist/a.whl",
        "out/cutlass/a.h",
        ".venv-test/lib/a.py",
        "tests/__pycache__/a.pyc",
        "python/tokenmill/_ops.so",
    ):
        (tree / stray).parent.mkdir(parents=True, exist_ok=True)
        (tree / stray).touch()
    for folder in ("bench", "triton_kernels"):
        (tree / "python" / "tokenmill" / folder).symlink_to(tree / folder)
    code = f"import build_backend; build_backend.build_sdist({str(out)!r})"
    environment = os.environ | {"PYTHONPATH": str(tree / "ci")}
    subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, check=True, capture_output=True
    )
    (archive,) = out.iterdir()
    with tarfile.open(archive) as files:
        names = [m.name.split("/", 1)[1] for m in files if m.isfile()]
    assert len(names) == len(set(names))
    return set(names)


def test_the_sdist_holds_what_a_wheel_is_built_from(sdist):
    folders = ("csrc", "ci", "python", "triton_kernels", "bench")
    wanted = {n for n in git_files(*folders) if not n.startswith("bench/results/")}
    roots = {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    assert wanted | roots <= sdist


def test_the_sdist_holds_nothing_else_than_sources(sdist):
    made = {n for n in sdist if n in ("PKG-INFO", "setup.cfg") or ".egg-info/" in n}
    assert sdist - made <= set(git_files())
    assert not [n for n in sdist if n.startswith("bench/results/")]


def script(name, monkeypatch):
    """A script of ci/ without suffix, as a module."""
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "ci" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    return module


def test_the_hub_project_has_every_source(monkeypatch, tmp_path):
    """Each source exists, each kernel for each instruction set and backend, each once per
    backend."""
    tomllib = pytest.importorskip("tomllib")  # CPython 3.11
    hub = script("hub", monkeypatch)
    monkeypatch.setattr(hub, "PROJECT", tmp_path)
    monkeypatch.delenv("TOKENMILL_OPS", raising=False)
    hub.write_project()
    build = tomllib.loads((tmp_path / "build.toml").read_text())
    assert (tmp_path / "torch-ext" / build["general"]["name"] / "__init__.py").exists()
    sources = {b: list(build["torch"]["src"]) for b in build["general"]["backends"]}
    for kernel in build["kernel"].values():
        sources[kernel["backend"]] += kernel["src"]
    kernels = [p.relative_to(hub.ROOT / "csrc") for p in (hub.ROOT / "csrc").glob("*/*/cpu*.cpp")]
    sets = {"baseline", "avx2", "avx512", "avx512_bf16", "avx512_amx"}
    assert hub.instruction_sets().keys() == sets
    for listed in sources.values():
        assert len(listed) == len(set(listed))
        assert not [s for s in listed if not (tmp_path / s).exists()]
        assert {f"built/{isa}/{k}" for isa in sets for k in kernels} <= set(listed)
    left = {"bindings", "emulated", "exchange", "old_libraries", "watch"}  # of _C and wheels
    shared = [p for d in ("core", "cpu") for p in (hub.ROOT / "csrc" / d).glob("*.cpp")]
    wanted = {str(p.relative_to(hub.ROOT)) for p in shared if p.stem not in left}
    assert wanted <= set(sources["cpu"]) & set(sources["cuda"])
    cuda = set(sources["cuda"]) - set(sources["cpu"])
    assert cuda and all(s.endswith(".cu") for s in cuda)
    once = {f"csrc/{p.relative_to(hub.ROOT / 'csrc')}" for p in hub.ROOT.glob("csrc/*/*/cuda*.cu")}
    assert once <= cuda
    for kernel in hub.ROOT.glob("csrc/*/*/kernel*.cu"):
        name = kernel.relative_to(hub.ROOT / "csrc").as_posix()
        folders = {
            Path(s).parts[1] for s in cuda if s.startswith("built/") and s.endswith(f"/{name}")
        }
        on_sm80 = not kernel.stem.endswith("_sm90")
        elements = {"half", "bfloat16", "float"} if on_sm80 else set()
        assert {folder.split("_")[0] for folder in folders} == elements
        by_mode = "TOKENMILL_MODE" in kernel.read_text()
        assert all(by_mode == ("_" in folder) for folder in folders)


@pytest.fixture
def rules(monkeypatch):
    return script("rules", monkeypatch)


LINE = "    x = 1\n"


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("csrc/a.cuh", "// TO" "DO: later\n", ["1: work mark TO" "DO"]),
        ("csrc/a.h", "int XXXL;\n" * 800, []),
        ("csrc/a.h", "int x;\n" * 801, ["801: more than 800 lines"]),
        (
            "csrc/cuda/a.cuh",
            '#include "cuda/b.cuh"\n#include "dense/attention/c.h"\n',
            ["2: dense/attention/c.h belongs to an operator"],
        ),
        ("csrc/dense/attention/a.cuh", '#include "dense/attention/c.h"\n', []),
        ("triton_kernels/a.py", "x = tl.dot(a, b)\n", ["1: tl.dot without input_precision"]),
        ("triton_kernels/a.py", "x = tl.dot(\n    a,\n    b,\n    acc,\n) * s\n", ["1: tl.dot "]),
        ("triton_kernels/a.py", 'x = tl.dot(\n    a, b, input_precision="ieee"\n)\n', []),
        ("tests/a.py", "x = tl.dot(a, b)\n", []),
        ("a.py", f"def f(\n    x,\n):\n    \"\"\"F.\n    \"\"\"\n{LINE * 80}", []),
        ("a.py", f"class A:\n  def f(x):\n{LINE * 81}", ["2: f has 81 lines, more than 80"]),
        ("a.py", f"def f():\n    def g():\n{'    ' + LINE}{LINE * 80}", ["1: f has 82 lines"]),
        ("a.cpp", f"void f(A a = {{}}) {{\n{LINE * 80}}}\nint a[] = {{\n{LINE * 81}}};\n", []),
        ("a.cpp", f"void f(A a = {{}}) {{\n{LINE * 81}}}\n", ["1: f has 81 lines, more than 80"]),
        (
            "a.cuh",
            "namespace a {\n#define OPEN {\nstruct alignas(16) A : B<int> {\n  A() : x{1} {}\n"
            "  // { \" (\n  __global__ void __launch_bounds__(f(1)) g(char c = '{') const {\n"
            f"    if (x) {{\n{LINE * 79}  }}\n  }}\n}};\n}}\n",
            ["6: g has 81 lines"],
        ),
        ("a.cpp", f'void f() {{\n  g(R"({{)", "{{", 1\'000);\n{LINE * 80}}}\n', ["1: f has 81"]),
    ],
)  # fmt: skip
def test_rules_find_what_breaks_them(rules, name, text, found):
    breaches = list(rules.breaches(name, text))
    assert len(breaches) == len(found)
    assert all(breach.startswith(start) for breach, start in zip(breaches, found, strict=True))


PACKAGE = "python/tokenmill/"


@pytest.mark.parametrize(
    ("imports", "found"),
    [
        ({"dense/a.py": "from ..select import b", "select/b.py": "from .._check import c"}, []),
        (
            {"dense/a.py": "def f():\n    from ..sparse.b import g", "sparse/b.py": ""},
            ["dense/a.py:2: dense imports sparse, of a higher floor"],
        ),
        (
            {"_call/a.py": "\nload = import_module('tokenmill.dense')".replace("'", '"'),
             "dense/__init__.py": ""},
            ["_call/a.py:2: _call imports dense, of a higher floor"],
        ),
        (
            {"dense/a.py": "if TYPE_CHECKING:\n    from . import b",
             "dense/b.py": "from .a import f"},
            ["circle of modules: tokenmill.dense."],
        ),
        (
            {"linear/a.py": "from ..tokens import b", "linear/c.py": "", "tokens/b.py": "",
             "tokens/d.py": "import tokenmill.linear.c"},
            ["circle of rooms: "],
        ),
        (
            {"novel/a.py": "from .. import _check", "_check.py": ""},
            ["novel/a.py:1: novel has no floor"],
        ),
    ],
)  # fmt: skip
def test_imports_run_downward(rules, monkeypatch, imports, found):
    monkeypatch.setattr(rules, "LONG", {})
    files = {PACKAGE + name: text + "\n" * 40 for name, text in imports.items()}
    breaches = [breach.removeprefix(PACKAGE) for breach in rules.tree_breaches(files)]
    assert len(breaches) == len(found)
    assert all(breach.startswith(start) for breach, start in zip(breaches, found, strict=True))


def test_small_files_are_shared(rules, monkeypatch):
    monkeypatch.setattr(rules, "LONG", {"csrc/dense/f/host.cpp": {"f"}})
    files = {
        "csrc/dense/f/host.cpp": '#include "dense/f/a.h"\nvoid f() {}\n',
        "csrc/dense/f/cpu.cpp": '#include "dense/f/a.h"\n#include "b.h"\n',
        "csrc/dense/f/a.h": "int a;\n",
        "csrc/dense/f/b.h": "int b;\n",
        "bench/a.py": "from .b import f\n" + "\n" * 40,
        "bench/b.py": "from .c import f\n",
        "bench/c.py": "\n" * 40,
    }
    assert sorted(rules.tree_breaches(files)) == [
        "bench/b.py:1: fewer than 40 lines, and only bench/a.py uses it",
        "ci/rules: f of csrc/dense/f/host.cpp is not longer than 80 lines",
        "csrc/dense/f/b.h:1: fewer than 40 lines, and only csrc/dense/f/cpu.cpp uses it",
    ]


def test_the_tree_keeps_the_rules(rules, capsys):
    code = [name for name in git_files() if Path(name).suffix in rules.CODE]
    assert rules.main(code) == 0, capsys.readouterr().out


def test_the_hooks_are_what_lint_runs():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"entry: (.*)", hooks)
    assert len(entries) == hooks.count("- id:") == hooks.count("language: system")
    lint = (ROOT / "ci" / "lint").read_text()
    checked = {re.sub(r" (--fix|-i)$", "", entry) for entry in entries}
    assert checked == {"ruff check", "ruff format", "clang-format", "ci/rules"}
    assert all(re.search(rf"^{entry}\b", lint, re.MULTILINE) for entry in checked)


@pytest.fixture
def ci_gpu(monkeypatch):
    return script("gpu", monkeypatch)


@pytest.mark.parametrize(
    ("capability", "archs"),
    [
        ((8, 0), ["80-real", "80-virtual"]),
        ((9, 0), ["90a-real", "80-virtual"]),
        ((12, 0), ["120f-real", "80-virtual"]),
        ((13, 0), ["80-virtual"]),
    ],
)
def test_a_chip_newer_than_nvcc_gets_ptx_with_a_notice(ci_gpu, capsys, capability, archs):
    known = ["sm_80", "sm_90", "sm_100", "sm_120"]
    assert ci_gpu.architectures(capability, known) == archs
    said = capsys.readouterr().out
    assert ("does not know compute capability 13.0: only PTX is built" in said) == (len(archs) == 1)


def test_a_chip_that_cannot_run_the_kernels_is_refused(ci_gpu):
    with pytest.raises(SystemExit, match=r"8\.0 or later is needed; this GPU has 7\.5"):
        ci_gpu.architectures((7, 5), ["sm_75", "sm_80"])


class Machine:
    """Machine interface of a ci/gpu run, in a folder of its own."""

    name, dry, jobs = "A GPU", True, "1"

    def __init__(self, folder):
        self.folder, self.out, self.environment = folder, folder / "out", dict(os.environ)


def runner(ci_gpu, monkeypatch, tmp_path, **options):
    monkeypatch.setattr(ci_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(ci_gpu, "sources_hash", lambda: "sources")
    return ci_gpu.Runner(Machine(tmp_path), **{"again": False, "limit": 60.0, **options})


def test_steps_are_recorded_as_they_end_and_resumed(ci_gpu, monkeypatch, tmp_path, capsys):
    run = runner(ci_gpu, monkeypatch, tmp_path)
    run.stage = "check"
    result = tmp_path / "deep" / "result"
    write = [sys.executable, "-c", f"open({str(result)!r}, 'a').write('x'); print('wrote it')"]
    run.step("good one", write, result)
    run.step("bad one", [sys.executable, "-c", "import sys; sys.exit('no such luck')"])
    run.step("absent", [tmp_path / "nothing"])
    assert run.failed == ["bad one", "absent"]
    entries = json.loads(run.record.read_text())["steps"]
    found = [(e["title"], e["status"], e["stage"]) for e in entries]
    assert found[:2] == [("good one", "ok", "check"), ("bad one", "failed (1)", "check")]
    assert found[2][1] == "failed (not started)"
    assert [e["last"] for e in entries[:2]] == ["wrote it", "no such luck"]
    assert (tmp_path / entries[1]["log"]).read_text() == "no such luck\n"

    again = runner(ci_gpu, monkeypatch, tmp_path)
    again.step("good one", write, result)
    assert "good one: done before" in capsys.readouterr().out
    assert result.read_text() == "x" and len(again.entries) == 3
    result.unlink()  # its output is gone: it runs again
    again.step("good one", write, result)
    assert result.read_text() == "x" and not again.failed
    again.step("goes on", write, resumed=result)
    assert result.read_text() == "xx"
    again.step("goes on", write, resumed=result)
    assert result.read_text() == "xx"
    anew = runner(ci_gpu, monkeypatch, tmp_path, again=True)
    anew.step("goes on", write, resumed=result)
    assert result.read_text() == "x"


def test_what_another_build_measured_is_forgotten(ci_gpu, tmp_path):
    here = ["build", {"cpu": "a"}]
    texts = {
        "mine": '{"build": "build", "machine": {"cpu": "a"}, "rows": []}',
        "build": '{"build": "other", "machine": {"cpu": "a"}, "rows": []}',
        "machine": '{"build": "build", "machine": {"cpu": "b"}, "rows": []}',
        "cut off": '{"build": "build", "mach',
    }
    files = [tmp_path / name for name in texts]
    for file, text in zip(files, texts.values(), strict=True):
        file.write_text(text)
    ci_gpu.drop_others([tmp_path / "none", *files], here)
    assert [*tmp_path.iterdir()] == [tmp_path / "mine"]


def test_a_step_that_hangs_is_ended_with_its_children(ci_gpu, monkeypatch, tmp_path):
    run = runner(ci_gpu, monkeypatch, tmp_path, limit=1.0)
    child = tmp_path / "child"
    run.step("hangs", ["sh", "-c", f"sleep 60 & echo $! > {child}; wait"])
    assert run.entries["hangs"]["status"] == "failed (more than 1 s)"
    state = Path(f"/proc/{child.read_text().strip()}/stat")

    def ended() -> bool:
        try:
            return state.read_text().split()[2] == "Z"
        except OSError:
            return True

    deadline = time.monotonic() + 10  # the signal has been sent; the child sleeps for 60 s
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended()


def test_rows_of_operators_become_one_file(ci_gpu, tmp_path):
    machine = Machine(tmp_path)
    machine.results = tmp_path / "all.json"
    files = [tmp_path / f"{n}.json" for n in range(3)]
    ci_gpu.gather_results(machine, files)
    assert not machine.results.exists()
    files[0].write_text('{"date": "old", "rows": [1, 2]}')
    files[1].write_text('{"date": "new", "rows": [3')
    files[2].write_text('{"date": "new", "rows": [4]}')
    ci_gpu.gather_results(machine, files)
    assert json.loads(machine.results.read_text()) == {"date": "new", "rows": [1, 2, 4]}


def test_operators_are_those_of_the_registry(ci_gpu):
    from tokenmill import registry

    for family in ci_gpu.FAMILIES:
        names = {n for n, spec in registry.ops().items() if spec.family == family}
        assert set(ci_gpu.operators(family)) == names
        assert names & set(ci_gpu.DRY_OPS)


def test_the_citation_has_the_version():
    from tokenmill import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_workflows_run_scripts_of_the_tree():
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    if not files:
        pytest.skip("an sdist")
    lines = [line for f in files for line in re.findall(r"- run: (.*)", f.read_text())]
    assert {line.split()[0] for line in lines} == {
        "ci/lint", "ci/test", "ci/sanitize", "ci/docs", "ci/wheel",
    }  # fmt: skip
    assert all(os.access(ROOT / line.split()[0], os.X_OK) for line in lines)
