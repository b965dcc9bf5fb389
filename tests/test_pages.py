"""The code of the pages in docs: each page runs from top to bottom, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch

from tokenmill import _cli
from tokenmill.__main__ import TWO_WORDS, _parser

ROOT = Path(__file__).resolve().parent.parent
# tests/test_documents.py and tests/test_models_page.py check their results, too.
ELSEWHERE = {"serving.md", "models.md"}
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^(?:    )+((?:python|torchrun) .*)$", re.MULTILINE)
OPTIONAL = {"cupy", "diffusers", "jax", "numpy", "timm", "transformers"}
DOCUMENTS = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md"))]
PAGES = [p for p in DOCUMENTS if p.parent != ROOT and CODE.search(p.read_text())]


def blocks(page):
    """The code blocks of a page, each with line numbers of the page."""
    text = page.read_text()
    for match in CODE.finditer(text):
        before = text.count("\n", 0, match.start(1))
        yield compile("\n" * before + match[1], page.name, "exec"), match[1]


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """An empty folder, seed 0, and the environment that torchrun gives a single process."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    torch.manual_seed(0)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in ELSEWHERE], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs(page, alone):
    names: dict = {"__name__": "page"}
    for code, text in blocks(page):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, names)
        except ModuleNotFoundError as missing:
            if (missing.name or "").partition(".")[0] not in OPTIONAL:
                raise
            continue
        said = re.findall(r"^ *print\(.*\)  # (.*)$", text, re.MULTILINE)
        if said:
            assert printed.getvalue().splitlines() == said


def test_commands_of_the_documents_exist():
    """`python -m tokenmill ...` parses, and scripts exist where the documents say."""
    parsed = 0
    for page in DOCUMENTS:
        for line in COMMANDS.findall(page.read_text()):
            words = shlex.split(line.partition(">")[0], comments=True)
            if "[" in line or "..." in line:  # the form of a command
                continue
            if words[:3] == ["python", "-m", "tokenmill"]:
                words = words[3:]
                if words[:1] == ["bench"] and words[1:2] in TWO_WORDS:
                    words = [" ".join(words[:2]), *words[2:]]
                try:
                    _, unknown = _parser().parse_known_args(words)
                except _cli.UsageError as error:
                    pytest.fail(f"{page.name}: {line}: {error}")
                assert not unknown, f"{page.name}: {line}"
                parsed += 1
            for word in words:
                if word.startswith("examples/"):
                    assert (ROOT / word).exists(), f"{page.name}: {line}"
    assert parsed or not DOCUMENTS
