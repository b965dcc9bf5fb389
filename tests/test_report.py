"""python -m tokenmill report: results of checks and measurements on one page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from tokenmill import _explain, registry
from tokenmill.__main__ import main

MACHINE = {"cpu": "Some <CPU>", "isa": "avx2", "gpu": "none", "torch": "2.13.0"}
HEAD = {"tokenmill": "0.1.0", "date": "2026-01-02"}
ROW = {
    "op": "gather_tokens", "case": "a & b", "dtype": "float32", "seconds": 0.0123456, "flops": 2e9,
    "peak_share": 0.5, "bytes_per_second": 1e9, "peers": {"good": {"ratio": 2.0}},
    "absent": {"other": "not installed"},
}  # fmt: skip
MOVED = ROW | {"op": "kv_cache_compact", "flops": 0.0, "peak_share": 0.0, "peers": {}}
FAILED = {"op": "topk_select", "case": "c", "dtype": "float32", "error": "ValueError: x"}
CHECKS = [
    {"op": "attention", "place": "cpu", "verdict": "WRONG", "tensors": 4,
     "shares": {"float32": 0.25, "float16": 1.5, "bfloat16": None},
     "problems": ["dense, float16: output 0 error 3, allowed 2"], "left_out": {}},
    {"op": "attention", "place": "triton", "verdict": "absent", "tensors": 0, "shares": {},
     "problems": [], "left_out": {}},
    {"op": "topk_select", "place": "triton", "verdict": "ok", "tensors": 1,
     "shares": {"float32": 0.0}, "problems": [], "left_out": {"wide": "rows are too wide"}},
]  # fmt: skip


class Page(HTMLParser):
    """Tags with their closing state, and table cells by row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.rows = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data


@pytest.fixture
def report(tmp_path, capsys):
    """Writes the documents, calls the command, and parses its page."""

    def make(**documents):
        for name, document in documents.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(document))
        files = [str(tmp_path / f"{name}.json") for name in documents]
        out = tmp_path / "new" / "page.html"
        assert main(["report", *files, "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"wrote {out}\n"
        text = out.read_text(encoding="utf-8")
        page = Page(text)
        assert not page.open
        assert not re.search(r"(src|href)=|@import|url\(|<script", text)
        return text, page

    return make


def measured(*rows, **more):
    return HEAD | {"machine": MACHINE, "threads": 1, "copy_bandwidth": 1e10, "rows": rows} | more


def checked(**more):
    states = {"cpu": "available (avx2)", "cuda": "no GPU"}
    document = {"machine": MACHINE, "backends": states, "places": ["cpu", "triton"]}
    return HEAD | document | {"checks": CHECKS} | more


def test_a_page_of_one_machine(report):
    text, page = report(times=measured(ROW, MOVED, FAILED), check=checked())
    assert text.count("times: Some &lt;CPU&gt;") > 1 and "check: " not in text
    budget = ["attention", "0.25", "1.50", "∞", "-", "-", "-"]
    assert budget in page.rows
    assert ["gather_tokens", "good", "2.00", "2.00", "2.00", "1", ""] in page.rows
    assert ["gather_tokens a & b", "12.3", "2.00", "50%", "1.00", "good 2.00"] in page.rows
    for row in (
        ["backend cuda", "no GPU"],
        ["attention on triton", "no kernel in this build"],
        ["topk_select on triton: wide", "rows are too wide"],
        ["topk_select: c", "ValueError: x"],
        ["peer other of gather_tokens", "not installed"],
    ):
        assert row in page.rows
    assert "attention</code>, cpu: dense, float16: output 0 error 3, allowed 2" in text
    assert sum(tag == "circle" for tag, _ in page.tags) == 1
    assert "Without operations: kv_cache_compact 1.00 GB/s." in text


def test_machines_with_the_same_facts_stay_apart(report):
    other = measured(ROW | {"seconds": 1.0})
    text, page = report(one=measured(ROW), two=other, check=checked())
    for name in ("one", "two", "check"):
        assert f"<h3>{name}: Some &lt;CPU&gt;</h3>" in text
    assert sum(row[:1] == ["gather_tokens a & b"] for row in page.rows) == 2
    assert "not in the files" in text


def test_counts_have_their_own_sections(report):
    launches = HEAD | {"cuda": "13.0", "multiprocessors": 132}
    launches |= {"rows": [{"op": "a", "case": "<b>", "blocks": [1, 2]}]}
    text, _ = report(launches=launches)
    assert "<h2>launches</h2>" in text and "`a` &lt;b&gt; | 1, 2" in text
    assert "Correct?" not in text


def test_steps_come_first(report):
    step = {"stage": "check", "title": "check <all>", "status": "ok", "seconds": 12.3}
    step |= {"last": "a & b", "log": "x.log", "command": 'run "it"'}
    bad = step | {"title": "bench", "status": "failed (more than 480 s)"}
    text, page = report(times=measured(ROW), steps={"device": "A GPU", "date": "2026-01-02",
                                                    "steps": [step, bad]})  # fmt: skip
    assert ["check", "check <all>", "ok", "12", "a & b"] in page.rows
    assert text.index("<h2>Steps</h2>") < text.index("<h2>Machines</h2>")
    assert ("td", {"class": "bad"}) in page.tags


def test_a_report_refuses_what_is_no_result(tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text('{"checks": []}')
    assert main(["report", str(bad)]) == 2
    rule = "FILE: must be results that bench --json, check --json or evaluate --json wrote; got '"
    assert capsys.readouterr().err.startswith(f"tokenmill report: {rule}{bad}'")
    good = tmp_path / "good.json"
    good.write_text(json.dumps(measured(ROW)))
    assert main(["report", str(good), "--out", str(tmp_path)]) == 2
    assert "tokenmill report: --out: must be writable; got" in capsys.readouterr().err


def test_check_writes_what_the_report_reads(report, tmp_path, monkeypatch, capsys):
    op, found = "query_similarity_gate", tmp_path / "found.json"
    sample = registry.get(op).samples[0].name
    missing = _explain.missing

    def lacking(spec, sample_, backend):
        return ["too odd"] if sample_.name == sample else missing(spec, sample_, backend)

    monkeypatch.setattr(_explain, "missing", lacking)
    words = [op, "--backend", "reference", "--dtype", "float32", "--json", str(found)]
    assert main(["check", *words]) == 0
    capsys.readouterr()
    document = json.loads(found.read_text())
    (row,) = document["checks"]
    assert row["shares"].keys() == {"float32"} and row["left_out"] == {sample: "too odd"}
    _, page = report(found=document)
    assert [f"{op} on reference: {sample}", "too odd"] in page.rows
    assert main(["check", op, "--json", str(tmp_path)]) == 2
    assert "--json: must be writable" in capsys.readouterr().err
