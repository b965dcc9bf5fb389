"""README, CHANGELOG, CONTRIBUTING and docs: links, sizes, and tables made from measured results."""

from __future__ import annotations

import collections
import importlib.machinery
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenmill as tm
from tokenmill.__main__ import main
from tokenmill.bench import report

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md"))]
PAGES += [*ROOT.glob("ptxvm/*.md"), *sorted(ROOT.glob("ptxvm/docs/*.md"))]
PERFORMANCE = ROOT / "docs" / "performance.md"
RESULTS = sorted(ROOT.glob("bench/results/*.json"))
sources = pytest.mark.skipif(not PAGES, reason="the documents are not beside the tests")
measured = pytest.mark.skipif(not RESULTS, reason="the results are not beside the tests")


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@sources
def test_every_relative_link_leads_somewhere():
    dead = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"\w+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert not dead


@sources
def test_the_code_of_the_page_on_serving_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    first, append, narrow, latent, cascade, tree = blocks
    has: dict = {}
    for block in (first, append, narrow):
        exec(block, has)
    alone = {name: has["last"][name] for name in ("seqlens_k", "block_table")}
    wide = tm.attention_decode(has["q"][None, 65:], has["k_cache"], has["v_cache"], **alone)
    torch.testing.assert_close(has["out8"], wide[0], rtol=0.2, atol=0.2)
    exec(latent, has)
    assert has["out"].shape == (71, 8, 512)
    exec(cascade, has)
    lengths = has["rest"]["seqlens_k"] + has["beginning"]["seqlens_k"]
    pages = has["beginning"]["block_table"].expand(3, -1)
    table = torch.cat([pages, has["rest"]["block_table"]], 1)
    caches = has["k_cache"], has["v_cache"]
    assert torch.equal(caches[0].flatten(0, 1)[128:192], has["k"][:64])
    whole = tm.attention_decode(has["q"][:, None], *caches, seqlens_k=lengths, block_table=table)
    torch.testing.assert_close(has["out"], whole[:, 0], rtol=1e-5, atol=1e-5)
    exec(tree, has)
    assert has["out"].shape == (5, 8, 64)


@sources
def test_pages_for_users_stay_short():
    for name, maximum in (("README.md", 99), ("CHANGELOG.md", 60), ("docs/performance.md", 200)):
        assert len((ROOT / name).read_text().splitlines()) <= maximum, name


@sources
def test_the_diff_that_adds_an_argument_applies_and_its_reference_runs(tmp_path):
    page = (ROOT / "docs" / "adding-an-argument.md").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    for name in re.findall(r"^--- a/(.*)$", diff, re.MULTILINE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    if (git := shutil.which("git")) is None:
        pytest.skip("git applies the diff")
    done = subprocess.run(
        [git, "apply", "--verbose", "-"], input=diff, cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    changed = tmp_path / "python/tokenmill/reference/dense/attention.py"
    loader = importlib.machinery.SourceFileLoader("tokenmill.reference.dense.n", str(changed))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    q, k, v = torch.randn(3, 1, 8, 2, 16, dtype=torch.float64).unbind()
    record = tm.registry.ops()["attention"].record
    fields = (*record(q, k, v)._fields, "negate")
    wider = collections.namedtuple("attention", fields)
    out, _ = module.attention(wider(*record(q, k, v), negate=True))
    turned, _ = module.attention(wider(*record(-q, k, v), negate=False))
    torch.testing.assert_close(out, turned, rtol=1e-12, atol=1e-12)


FAMILIES = ("dense", "linear", "sparse", "select", "tokens")
OPERATOR = re.compile(r"^\| (`.*?`) \| .* \| (.*?) \| (∇?) ?\|$", re.MULTILINE)


@sources
@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_of_operators_names_each_function_once(family):
    page = (ROOT / "docs/operators.md").read_text()
    (section,) = re.findall(rf"^## {family.capitalize()}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    rows = [(re.findall(r"`(\w+)`", row[0]), *row[1:]) for row in OPERATOR.findall(section)]
    module = f"tokenmill.{family}."
    public = [n for n in tm.__all__ if inspect.isfunction(getattr(tm, n))]
    there = [n for n in public if getattr(tm, n).__module__.startswith(module)]
    assert sorted(name for names, *_ in rows for name in names) == sorted(there)
    for names, runs_as, gradients in rows:
        specs = [tm.registry.ops().get(name) for name in names]
        for name, spec in zip(names, specs, strict=True):
            assert (runs_as == "kernels") == (spec is not None), name
            assert spec is None or bool(gradients) == bool(spec.differentiable), name


@sources
@measured
def test_one_script_rewrites_every_generated_page(monkeypatch):
    loader = importlib.machinery.SourceFileLoader("tables", str(ROOT / "ci" / "tables"))
    tables = importlib.util.module_from_spec(importlib.util.spec_from_loader("tables", loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(tables)
    for name, make in tables.PAGES.items():
        page = (ROOT / name).read_text()
        assert make(page) == page, f"{name}: run ci/tables"
        assert make(re.sub(r"\n\| .* \| batch.*", "", page)) == page, name
    pages = "".join(page.read_text() for page in PAGES)
    generated = set(re.findall(r"(?:--update|>) (docs/[\w-]+\.md)", pages))
    assert generated and generated <= set(tables.PAGES)


@sources
@measured
def test_the_performance_page_is_updated_from_the_results(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(PERFORMANCE.read_text())
    assert main(["bench", "report", *map(str, RESULTS), "--update", str(page)]) == 0
    assert page.read_text() == PERFORMANCE.read_text()


ROW = {
    "op": "gather_tokens", "case": "a | b", "dtype": "float32", "seconds": 0.0123456, "flops": 2e9,
    "peak_share": 0.5, "bytes_per_second": 1.234e9,
    "peers": {"good": {"seconds": 0.0246912, "flops": 1e9, "ratio": 2.0}},
    "absent": {"other": "not installed"},
}  # fmt: skip
RUN = {
    "machine": {"cpu": "Some CPU", "isa": "avx2", "gpu": "Some GPU", "torch": "2.13.0"},
    "tokenmill": "0.1.0", "date": "2026-01-02", "threads": 2, "copy_bandwidth": 2e10,
}  # fmt: skip


def test_a_report_names_the_machine_failures_and_absent_peers(tmp_path, capsys):
    failed = {"op": "gather_tokens", "case": "c", "dtype": "float32", "error": "ValueError: x"}
    name = tmp_path / "some.json"
    name.write_text(json.dumps(RUN | {"rows": [ROW, failed]}))
    assert main(["bench", "report", str(name)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "### some",
        "",
        "Some CPU, avx2, 2 thread(s), torch 2.13.0; tokenmill 0.1.0, 2026-01-02.",
        "Measured ceilings: float32 4.00 GFLOP/s, copy 20.0 GB/s.",
        "",
        "| `gather_tokens` | ms | GFLOP/s | % of peak | GB/s | good |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a \\| b | 12.3 | 2.00 | 50% | 1.23 | 2.00 |",
        "| c | failed: ValueError: x |  |  |  |  |",
        "",
        "Absent: other (not installed).",
    ]


def test_a_report_of_counters_marks_what_is_above_the_peers(tmp_path, capsys):
    figures = {
        "binding_unit": "alu", "binding_cycles": 1300.4, "instructions": 250.0, "waves": 3.0,
        "traffic_over_least": 1.5, "mma_over_least": 0.0, "waves_over_ideal": 1.0,
    }  # fmt: skip
    rows = [
        {"op": "topk_select", "case": "a", **figures, "against": {"instructions": 200}},
        {"op": "topk_select", "case": "b", "error": "ValueError: x", "against": {}},
    ]
    head = {"tokenmill": "0.1.0", "cuda": "13.0", "date": "2026-01-02"}
    head |= {"per": {"topk_select": "32 keys"}, "counted_peers": {"topk_select": "CUB"}}
    name = tmp_path / "counts.json"
    name.write_text(json.dumps(head | {"rows": rows}))
    assert main(["bench", "report", str(name)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "### counts",
        "",
        "Exact counts on the PTX machine, PTX of CUDA 13.0; tokenmill 0.1.0, 2026-01-02. "
        "Bold: above the peer.",
        "",
        "| `topk_select`, per 32 keys | unit | cycles | instructions | peer | bytes / least "
        "| mma / least | waves | waves / ideal |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| a | alu | 1300 | **250** | 200 | 1.50 | 0.00 | 3.00 | 1.00 |",
        "| b | failed: ValueError: x |  |  |  |  |  |  |  |",
        "",
        "Peers: CUB.",
    ]


def test_a_report_of_launches_shows_calls_side_by_side(tmp_path, capsys):
    rows = [{"op": "a", "case": str(i), "blocks": [i, 2]} for i in range(5)]
    head = {"tokenmill": "0.1.0", "cuda": "13.0", "date": "2026-01-02", "multiprocessors": 132}
    name = tmp_path / "launches.json"
    name.write_text(json.dumps(head | {"rows": rows}))
    assert main(["bench", "report", str(name)]) == 0
    assert capsys.readouterr().out.splitlines()[4:] == [
        "| call | blocks | call | blocks | call | blocks |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `a` 0 | 0, 2 | `a` 2 | 2, 2 | `a` 4 | 4, 2 |",
        "| `a` 1 | 1, 2 | `a` 3 | 3, 2 |  |  |",
    ]


def test_rates_are_in_teraflops_beside_those_of_peers(tmp_path, capsys):
    rows = [
        {"op": "a", "case": "short", "flops": 4.5e14, "peers": {"p": {"flops": 3e13}}},
        {"op": "a", "case": "longer", "flops": 1.23456e15, "peers": {}},
        {"op": "a", "case": "none", "error": "no memory"},
    ]
    name = tmp_path / "r.json"
    name.write_text(json.dumps(RUN | {"rows": rows}))
    assert main(["bench", "report", "--rates", str(name)]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[word.strip() for word in line if word] for line in lines] == [
        ["r: TFLOP/s", "tokenmill", "p"],
        ["short", "450", "30.0"],
        ["longer", "1235"],
        ["none", "failed: no memory"],
    ]


def test_a_report_refuses_what_is_no_result_and_pages_without_markers(tmp_path, capsys):
    headless, good, page = (tmp_path / name for name in ("h.json", "g.json", "page.md"))
    headless.write_text('{"rows": []}')
    good.write_text(json.dumps(RUN | {"rows": []}))
    page.write_text(report.BEGIN)
    for words, message in (
        ([], "the following arguments are required: FILE"),
        ([tmp_path / "none.json"], "FILE: must be results that bench --json wrote; got '"),
        ([headless], "FILE: must be results that bench --json wrote; got '"),
        ([good, "--update", page], "--update: must be a page with the lines '"),
        ([good, "--update", tmp_path], "--update: must be a page with the lines '"),
    ):
        assert main(["bench", "report", *map(str, words)]) == 2
        assert capsys.readouterr().err.startswith(f"tokenmill bench report: {message}")
    assert page.read_text() == report.BEGIN
