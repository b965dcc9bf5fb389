"""The index of papers: names in its rows exist, and docs/papers.md is generated from them."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import importlib.util
import inspect
import io
import json
import re
import sys
from pathlib import Path

import pytest
from collected import backends_of

import tokenmill as tm
from tokenmill import _explain, papers, registry
from tokenmill.__main__ import main
from tokenmill.papers import FAMILIES, show
from tokenmill.papers.paper import BACKENDS, PLAIN, STATES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "papers.md"
HERE = [paper for paper in papers.PAPERS if paper.call]
sources = pytest.mark.skipif(not PAGE.exists(), reason="the documents are not beside the tests")
each_here = pytest.mark.parametrize("paper", HERE, ids=lambda paper: f"{paper.number}")


def test_there_are_61_papers_and_no_two_alike():
    assert [paper.number for paper in papers.PAPERS] == list(range(1, 62))
    for field in ("name", "title", "arxiv"):
        assert len({getattr(paper, field) for paper in papers.PAPERS}) == 61, field
    for paper in papers.PAPERS:
        assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv) or paper.arxiv == "1506.03134"
        assert 2015 <= paper.year <= 2025 and paper.title and paper.authors


def test_every_computation_has_its_call_and_others_say_why_not():
    of = {s: {paper.number for paper in papers.PAPERS if paper.state == s} for s in STATES}
    assert len(of["no computation"]) == 19
    for paper in papers.PAPERS:
        assert paper.family in FAMILIES
        assert bool(paper.call) == bool(paper.computes) == (paper.family != "none"), paper.name
        if not paper.call:
            assert not (paper.test or paper.example or paper.backends or paper.measured)
            assert paper.note, paper.name


@each_here
def test_each_row_says_what_it_was_checked_against(paper):
    released = r"released code: [\w.-]+/[\w.-]+ at [0-9a-f]{7}"
    assert re.match(rf"{released}|text only|peer: \w+", paper.checked), paper.checked
    assert paper.snippet.startswith("import torch\nimport tokenmill as tm\n"), paper.name
    assert len(paper.keywords) >= 3


def named(call):
    """Names in a call of the index: a function or class, and its keywords."""
    tree = ast.parse(call, mode="eval").body
    keywords = []
    if isinstance(tree, ast.Call):
        assert not tree.args, call
        tree, keywords = tree.func, [keyword.arg for keyword in tree.keywords]
    first, *path = ast.unparse(tree).split(".")
    assert first == "tokenmill"
    if path[0] == "integrations":
        module = importlib.import_module(".".join([first, *path[:2]]))
        return functools.reduce(getattr, path[2:], module), keywords
    return functools.reduce(getattr, path, tm), keywords


@each_here
def test_calls_are_in_the_package(paper):
    for call in paper.call:
        function, keywords = named(call)
        parameters = inspect.signature(function).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            assert set(keywords) <= {p.name for p in parameters}, call
        spec = registry.ops().get(function.__name__)
        for backend in paper.backends if spec else ():
            built = any(_explain.kernels(s, backend) != "-" for s in registry.ops().values())
            assert not built or _explain.kernels(spec, backend) != "-", (call, backend)
    assert set(paper.backends) <= {*BACKENDS, *PLAIN}
    assert paper.backends


def names_of(paper):
    """Functions and classes that the calls of a row name, without their packages."""
    return {re.split(r"[.(]", call.split("(")[0])[-1] for call in paper.call}


def words_of(paths):
    return {word for path in paths for word in re.findall(r"\w+", (ROOT / path).read_text())}


@each_here
def test_every_call_of_a_row_is_tested(paper):
    for path in paper.test:
        assert path.startswith("tests/") and (ROOT / path).is_file(), path
        tree = ast.parse((ROOT / path).read_text())
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert any(name.startswith("test_") for name in functions), path
    assert not names_of(paper) - words_of(paper.test)


@each_here
def test_the_tests_of_a_row_run_on_its_backends(paper, request):
    """Each backend is a parameter of some test of the row."""
    if paper.backends == PLAIN:
        return
    of_cuda = {"cuda", "emulated"}
    able = {name for name, state in tm.backends().items() if state.startswith(("avail", "interp"))}
    every = backends_of(request.session, [ROOT / path for row in HERE for path in row.test])
    ran = set().union(*(every[ROOT / path] for path in paper.test))
    for backend in paper.backends:
        names = of_cuda if backend == "cuda" else {backend}
        if names & able or backend == "reference":
            assert names & ran, (paper.name, backend, ran)


@sources
def test_examples_are_there():
    for paper in HERE:
        if paper.example:
            assert names_of(paper) & words_of([paper.example]), paper.name


@sources
def test_figures_are_those_of_the_performance_page():
    page = (ROOT / "docs" / "performance.md").read_text()
    for paper in HERE:
        for figure in re.findall(r"\d+\.\d+", paper.measured):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", page), paper.measured


@sources
def test_the_page_is_that_of_the_table():
    assert PAGE.read_text() == show.markdown(), "python -m tokenmill papers --markdown > " + str(
        PAGE
    )


def test_words_find_rows():
    assert papers.find("EVIT")[0] == papers.PAPERS[0]
    assert papers.find(1) == papers.find("1") == (papers.PAPERS[0],)
    assert {p.number for p in papers.find("sparse_decode_attention")} >= {8, 27, 28, 37}
    assert papers.find("no such paper") == papers.find(62) == ()
    with pytest.raises(tm.InputError) as error:
        papers.find(None)
    message = "tokenmill.papers.find: query: must be a string or a number; got None"
    assert str(error.value) == message


@pytest.mark.parametrize(
    "query, numbers",
    [
        ("linear attention", {57, 58, 11}),
        ("sparse attention", {33, 10, 12}),
        ("KV cache", {27, 28, 37, 24, 52, 8}),
        ("eviction", {37, 52}),
        ("prune", {1, 39, 7}),
        ("token pruning", {1, 39}),
        ("token merging", {1, 29}),
        ("ImageNet", {1, 12, 59}),
        ("attention sink", {37, 18, 17}),
        ("hallucination", {36}),
        ("test-time memory", {45}),
        ("long context", {6, 9, 33}),
        ("segmentation", {39, 29}),
        ("arxiv.org/abs/2405.17381", {57}),
        ("https://arxiv.org/pdf/2405.17381v2.pdf", {57}),
        ("arXiv:2111.11418", {59}),
        ("2111.11418v3", {59}),
    ],
)
def test_words_that_a_reader_would_type(query, numbers):
    found = {paper.number for paper in papers.find(query)}
    assert numbers <= found, found
    assert len(found) <= 25


def test_a_word_matches_from_its_beginning():
    assert 29 not in {paper.number for paper in papers.find("ring")}  # "clustering"
    assert papers.find("HiP attention")[0].number == 33
    assert papers.find("TokenSelect")[0].number == 8
    assert papers.find("the of") == ()


def test_a_word_of_no_paper_names_what_is_near(capsys):
    assert main(["papers", "biformr"]) == 2
    said = capsys.readouterr().err
    assert "no paper of the index holds 'biformr'; near to it: biformer" in said
    assert main(["papers", "zzzz"]) == 2
    assert "near" not in capsys.readouterr().err


def test_examples_of_the_documentation():
    assert doctest.testmod(papers).failed == 0


def test_one_line_for_each_paper(capsys):
    assert main(["papers"]) == 0
    out = capsys.readouterr().out
    for paper in papers.PAPERS:
        assert re.search(rf"^ *{paper.number}  {re.escape(paper.name)} ", out, re.M)
    assert "61 papers: " in out and "19 without a computation" in out
    assert main(["papers", "linear", "attention"]) == 0
    assert "57  Lightning Attention" in capsys.readouterr().out


def test_all_that_is_known_of_some(capsys):
    assert main(["papers", "biformer"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("12  BiFormer (Zhu et al. 2023)\n") and out.count("\n\n") == 0
    for word in ("call      tokenmill.nn.BiFormerAttention", "test      tests/", "measured  map"):
        assert f"\n  {word}" in out


def test_rows_as_json_and_as_a_page(capsys):
    assert main(["papers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 61 and rows[0]["link"] == "https://arxiv.org/abs/2202.07800"
    assert rows[1]["state"] == papers.PAPERS[1].state
    assert main(["papers", "45", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["year"] == 2025
    assert main(["papers", "--markdown"]) == 0
    assert capsys.readouterr().out == show.markdown()
    assert main(["papers", "4", "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "DOEI" in page and "EViT" not in page and "### " not in page


@pytest.mark.skipif(not importlib.util.find_spec("rich"), reason="no rich")
def test_a_terminal_gets_a_table(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["papers"]) == 0
    assert "EViT" in terminal.getvalue() and "│" in terminal.getvalue()
