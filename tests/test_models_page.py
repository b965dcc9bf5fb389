"""The code of docs/models.md runs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.24")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documents are not beside the tests")
def test_the_code_of_the_page_on_models_runs():
    """Blocks that need libraries that are not installed are skipped."""
    has: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 11
    for block in blocks:
        libraries = set(re.findall(r"(?:from|import) (timm|diffusers|jax)\b", block))
        libraries |= set(re.findall(r"integrations\.(kvpress)\b", block))
        if all(find_spec(library) for library in libraries):
            exec(block, has)
    assert has["route"].served == 2
    assert has["out"].shape == has["beams"].shape == has["chunks"].shape == (2, 308)
    assert (has["out"] == has["chunks"]).all()
    assert len(has["read"]) == 2
    assert has["size"].shape == (1, 41) and has["rows"].shape == (1, 197)
    assert [len(r.generated_tokens) for r in has["results"].values()] == [4, 4]
    if find_spec("timm"):
        assert has["logits"].shape == (1, 1000) and has["reduction"].source.shape == (1, 71)
    if find_spec("diffusers"):
        assert has["noise"].shape == (1, 4, 16, 16)
    if find_spec("jax"):
        assert has["gradient"].shape == (1, 16, 2, 32)
